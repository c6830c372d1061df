//! How an error reaches the user: one line `error:`, one line `hint:`, an exit code.
//!
//! Hints belong to the typed errors of the rooms; this file only finds them in an `anyhow` chain. No
//! catch-all error enum, and no hint is chosen by reading a message.

use std::error::Error;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use grpo_policy::error::PolicyError;

use crate::{
    authoring::AuthoringError,
    cases::CasesError,
    commands::{
        CasesFailed, FileExists, GrantsChanged, Interrupted, LockMissing, NotBuilt,
        NothingToProfile, PluginBenchError, PluginChanged, ResumeChanges,
    },
    config::ConfigError,
    data::DataError,
    draft::DraftError,
    grpo::loss::LossError,
    hub::HubError,
    judge::JudgeSetupError,
    plugin::{PluginError, WeightError},
    registry::{RegistryError, TrustError},
    replay::ReplayError,
    run::RunError,
    setup::{GrantError, MissingPlugin, WrongSettings},
    swap::{ConformanceError, SwapError},
    trainer::TrainError,
};

/// Exit code of usage and config errors.
pub const EXIT_USAGE: u8 = 2;
/// Exit code of every other failure.
pub const EXIT_FAILURE: u8 = 1;

type Link<'a> = &'a (dyn Error + 'static);

/// One line per error type that has hints.
const HINTS: &[fn(Link<'_>) -> Option<String>] = &[
    |link| hint_of(link, ConfigError::hint),
    |link| hint_of(link, PolicyError::hint),
    |link| hint_of(link, PluginError::hint),
    |link| hint_of(link, WeightError::hint),
    |link| hint_of(link, MissingPlugin::hint),
    |link| hint_of(link, WrongSettings::hint),
    |link| hint_of(link, AuthoringError::hint),
    |link| hint_of(link, CasesError::hint),
    |link| hint_of(link, CasesFailed::hint),
    |link| hint_of(link, NotBuilt::hint),
    |link| hint_of(link, DataError::hint),
    |link| hint_of(link, DraftError::hint),
    |link| hint_of(link, HubError::hint),
    |link| hint_of(link, RegistryError::hint),
    |link| hint_of(link, TrustError::hint),
    |link| hint_of(link, JudgeSetupError::hint),
    |link| hint_of(link, GrantError::hint),
    |link| hint_of(link, RunError::hint),
    |link| hint_of(link, LossError::hint),
    |link| hint_of(link, TrainError::hint),
    |link| hint_of(link, Interrupted::hint),
    |link| hint_of(link, FileExists::hint),
    |link| hint_of(link, NothingToProfile::hint),
    |link| hint_of(link, PluginBenchError::hint),
    |link| hint_of(link, PluginChanged::hint),
    |link| hint_of(link, LockMissing::hint),
    |link| hint_of(link, GrantsChanged::hint),
    |link| hint_of(link, ResumeChanges::hint),
    |link| hint_of(link, ReplayError::hint),
    |link| hint_of(link, SwapError::hint),
    |link| hint_of(link, ConformanceError::hint),
];

/// One line per error type that is the user's command line or config to mend.
const USAGE: &[fn(Link<'_>) -> bool] = &[
    |link| link.is::<ConfigError>(),
    |link| link.is::<WeightError>(),
    |link| {
        matches!(
            link.downcast_ref(),
            Some(JudgeSetupError::NoKey { .. } | JudgeSetupError::BadKey { .. })
        )
    },
    |link| link.is::<ResumeChanges>(),
    |link| link.is::<GrantError>(),
    |link| link.is::<MissingPlugin>() || link.is::<WrongSettings>(),
    |link| link.is::<CasesError>() || link.is::<NotBuilt>(),
    |link| link.downcast_ref().is_some_and(AuthoringError::is_usage),
    |link| matches!(link.downcast_ref(), Some(RegistryError::Reference { .. })),
    |link| matches!(link.downcast_ref(), Some(TrustError::Key { .. })),
    |link| matches!(link.downcast_ref(), Some(LossError::Config { .. })),
    |link| matches!(link.downcast_ref(), Some(ReplayError::NoReward { .. })),
    |link| {
        link.downcast_ref()
            .is_some_and(PluginError::is_of_the_config)
    },
];

fn hint_of<E: Error + 'static>(link: Link<'_>, hint: fn(&E) -> Option<String>) -> Option<String> {
    link.downcast_ref::<E>().and_then(hint)
}

/// `error: what failed: cause: cause`, and `hint: …` on a second line if some error of the chain has
/// one; the outermost hint wins. No newline at the end.
pub fn render(error: &anyhow::Error) -> String {
    let (message, hint) = message_and_hint(error);
    report(&message, hint.as_deref())
}

/// The two texts of [`render`], not yet made one line each.
pub fn message_and_hint(error: &anyhow::Error) -> (String, Option<String>) {
    let mut message = String::new();
    for link in error.chain() {
        let text = link.to_string();
        // Messages of typed errors often end in their cause already.
        if message.ends_with(&text) {
            continue;
        }
        if !message.is_empty() {
            message.push_str(": ");
        }
        message.push_str(&text);
    }
    let hint = error
        .chain()
        .find_map(|link| HINTS.iter().find_map(|hint| hint(link)));
    (message, hint)
}

/// The exit code that goes with [`render`]'s text.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    let usage = |link| USAGE.iter().any(|is_usage| is_usage(link));
    if error.chain().any(usage) {
        EXIT_USAGE
    } else {
        EXIT_FAILURE
    }
}

/// A command line that clap refused, in the same two lines.
pub fn render_usage(error: &clap::Error) -> String {
    // clap's text is a paragraph with what is wrong, then tips and usage.
    let text = error.to_string();
    let message = text.split("\n\n").next().unwrap_or(&text);
    let message = message.strip_prefix("error: ").unwrap_or(message);
    let meant = [
        ContextKind::SuggestedArg,
        ContextKind::SuggestedSubcommand,
        ContextKind::SuggestedValue,
    ]
    .into_iter()
    .find_map(|kind| match error.get(kind)? {
        ContextValue::String(name) => Some(name.clone()),
        ContextValue::Strings(names) => names.first().cloned(),
        _ => None,
    });
    let misplaced = error.kind() == ErrorKind::ArgumentConflict
        && error.get(ContextKind::InvalidSubcommand).is_some();
    let hint = match meant {
        Some(name) => format!("did you mean `{name}`?"),
        None if misplaced => "put the flags after the command".to_owned(),
        None => "`--help` lists commands and flags".to_owned(),
    };
    report(message, Some(&hint))
}

fn report(message: &str, hint: Option<&str>) -> String {
    let mut text = format!("error: {}", one_line(message));
    if let Some(hint) = hint {
        text.push_str("\nhint: ");
        text.push_str(&one_line(hint));
    }
    text
}

/// Newlines become spaces, and other control characters visible escapes: file contents and guest output
/// may stand in a message and must not move the cursor or forge a line.
pub fn one_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for word in text.split(['\n', '\r', '\t']).map(str::trim) {
        if word.is_empty() {
            continue;
        }
        if !line.is_empty() {
            line.push(' ');
        }
        for c in word.chars() {
            if c.is_control() {
                line.extend(c.escape_default());
            } else {
                line.push(c);
            }
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use std::{io, path::PathBuf};

    use anyhow::Context;
    use clap::Parser;

    use super::*;

    fn missing() -> ConfigError {
        ConfigError::Read {
            path: PathBuf::from("run.yaml"),
            source: io::Error::new(io::ErrorKind::NotFound, "no such file"),
        }
    }

    #[test]
    fn chain_on_one_line_without_repeats_and_the_typed_hint() {
        let error = Err::<(), _>(missing()).context("cannot start").unwrap_err();
        assert_eq!(
            render(&error),
            "error: cannot start: cannot read config run.yaml: no such file\n\
             hint: give the path of a YAML file"
        );
        assert_eq!(exit_code(&error), EXIT_USAGE);
    }

    #[test]
    fn a_policy_error_brings_its_hint_and_code_1() {
        let error = anyhow::Error::new(PolicyError::Architecture {
            found: "mamba".to_owned(),
        });
        assert_eq!(
            render(&error),
            "error: unsupported model architecture `mamba`\n\
             hint: Qwen2, Qwen3 and Llama decoders are supported"
        );
        assert_eq!(exit_code(&error), EXIT_FAILURE);
    }

    #[test]
    fn no_hint_no_second_line_and_no_control_characters() {
        let error = anyhow::anyhow!("row 3\n  says \u{1b}[31mred\u{7}");
        assert_eq!(render(&error), "error: row 3 says \\u{1b}[31mred\\u{7}");
    }

    #[derive(Parser)]
    struct Sample {
        #[arg(long)]
        steps: Option<u32>,
    }

    #[test]
    fn clap_errors_take_the_same_form() {
        let refuse = |args: &[&str]| match Sample::try_parse_from(args) {
            Err(error) => render_usage(&error),
            Ok(sample) => panic!("accepted {:?}", sample.steps),
        };
        assert_eq!(
            refuse(&["x", "--step", "3"]),
            "error: unexpected argument '--step' found\nhint: did you mean `--steps`?"
        );
        assert_eq!(
            refuse(&["x", "--steps", "three"]),
            "error: invalid value 'three' for '--steps <STEPS>': invalid digit found in string\n\
             hint: `--help` lists commands and flags"
        );
    }
}
