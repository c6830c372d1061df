//! Writing a new project: the files of a language and role, the WIT, a README and cases for `plugin test`.

use super::{AuthoringError, Language};
use crate::types::Role;
use std::fs;
use std::path::Path;

/// Path in the project, and contents. `{{name}}` stands for the plugin's name; [`create`] has the others.
type File = (&'static str, &'static str);

/// A file of `host/templates`.
macro_rules! file {
    ($folder:literal, $path:literal) => {
        (
            $path,
            include_str!(concat!("../../templates/", $folder, "/", $path)),
        )
    };
}

/// A file of the WIT.
macro_rules! wit {
    ($name:literal) => {
        (
            concat!("wit/", $name),
            include_str!(concat!("../../../wit/v0.1/", $name)),
        )
    };
}

/// What every project has, unless its language has another file of this path.
const SHARED: [File; 6] = [
    wit!("types.wit"),
    wit!("host.wit"),
    wit!("judge.wit"),
    wit!("http.wit"),
    wit!("secrets.wit"),
    ("plugin.json", include_str!("../../templates/plugin.json")),
];

/// What every project of a role has. The only world in `wit/` is that of the project, but for rewards, which may be wrappers
/// or built by hand.
fn of_role(role: Role) -> &'static [File] {
    match role {
        Role::Reward => &[
            wit!("reward.wit"),
            wit!("formatter.wit"),
            wit!("curriculum.wit"),
            ("cases.jsonl", include_str!("../../templates/cases.jsonl")),
        ],
        Role::Formatter => &[
            wit!("formatter.wit"),
            file!("formatter", "cases.jsonl"),
            ("README.md", README),
        ],
        Role::Curriculum => &[
            wit!("curriculum.wit"),
            file!("curriculum", "cases.jsonl"),
            ("README.md", README),
        ],
    }
}

/// Of formatters and curricula.
const README: &str = include_str!("../../templates/roles-readme.md");

/// The rest of a project; `None` where nobody has written it.
fn files(language: Language, role: Role) -> Option<&'static [File]> {
    const CARGO: File = file!("rust", "Cargo.toml");
    const PACKAGE: File = file!("js", "package.json");
    Some(match (role, language) {
        (Role::Reward, language) => of_reward(language),
        (_, Language::C | Language::Zig | Language::Go) => return None,
        (Role::Formatter, Language::Rust) => &[
            CARGO,
            (
                "src/lib.rs",
                include_str!("../../templates/formatter/lib.rs"),
            ),
        ],
        (Role::Curriculum, Language::Rust) => &[
            CARGO,
            (
                "src/lib.rs",
                include_str!("../../templates/curriculum/lib.rs"),
            ),
        ],
        (Role::Formatter, Language::Python) => &[file!("formatter", "plugin.py")],
        (Role::Curriculum, Language::Python) => &[file!("curriculum", "plugin.py")],
        (Role::Formatter, Language::Js) => &[PACKAGE, file!("formatter", "plugin.js")],
        (Role::Curriculum, Language::Js) => &[PACKAGE, file!("curriculum", "plugin.js")],
    })
}

/// What the plugin does as it stands.
fn does(role: Role) -> &'static str {
    match role {
        Role::Reward => "compares the last number of a completion with the row's column answer",
        Role::Formatter => {
            "asks the row's question with an instruction, and takes what stands behind #### for the answer"
        }
        Role::Curriculum => {
            "takes the rows in turn, and passes over those that were mastered when they were last answered"
        }
    }
}

fn of_reward(language: Language) -> &'static [File] {
    match language {
        Language::Rust => &[
            file!("rust", "Cargo.toml"),
            file!("rust", "README.md"),
            file!("rust", "src/lib.rs"),
        ],
        Language::C => &[
            file!("c", "README.md"),
            file!("c", "json.h"),
            file!("c", "plugin.c"),
            file!("c", "plugin.h"),
        ],
        Language::Zig => &[
            file!("zig", "README.md"),
            file!("zig", "abi.zig"),
            file!("zig", "plugin.zig"),
        ],
        Language::Python => &[file!("python", "README.md"), file!("python", "plugin.py")],
        Language::Go => &[
            file!("go", "README.md"),
            file!("go", "abi.go"),
            file!("go", "abi.s"),
            file!("go", "go.mod"),
            file!("go", "plugin.go"),
            file!("go", "plugin.json"),
        ],
        Language::Js => &[
            file!("js", "README.md"),
            file!("js", "package.json"),
            file!("js", "plugin.js"),
        ],
    }
}

/// Writes a project into the new folder `dir`, whose last part is the plugin's name.
///
/// # Errors
/// A role that the language has no template for, a name that no package could have, a folder that is there, and what the
/// file system refuses.
pub fn create(language: Language, role: Role, dir: &Path) -> Result<(), AuthoringError> {
    let files = files(language, role).ok_or(AuthoringError::NoTemplate { language, role })?;
    let name = dir.file_name().unwrap_or(dir.as_os_str()).to_string_lossy();
    if !is_name(&name) {
        return Err(AuthoringError::Name {
            name: name.into_owned(),
        });
    }
    if dir.symlink_metadata().is_ok() {
        return Err(AuthoringError::Exists {
            dir: dir.to_owned(),
        });
    }
    let description = does(role);
    let mut does = description.chars();
    let description = does.next().map_or_else(String::new, |first| {
        first.to_uppercase().chain(does).collect()
    });
    for (path, text) in SHARED.iter().chain(of_role(role)).chain(files) {
        let (path, name_in) = (dir.join(path), *path);
        let folder = path.parent().unwrap_or(dir);
        fs::create_dir_all(folder).map_err(AuthoringError::file(folder))?;
        let text = text.replace("{{name}}", &name);
        let text = match name_in {
            "plugin.json" => text.replace("{{description}}", &description),
            "README.md" => fill(&text, language, role),
            _ => text,
        };
        fs::write(&path, text).map_err(AuthoringError::file(&path))?;
    }
    Ok(())
}

/// The README of a role's project; that of a reward has nothing to fill.
fn fill(text: &str, language: Language, role: Role) -> String {
    let case = match role {
        Role::Formatter => "a row with its prompt, or a completion with its reasoning and answer,",
        Role::Curriculum => "plans with what they are made of",
        Role::Reward => "a sample and its reward",
    };
    let main = match language {
        Language::Rust => "src/lib.rs",
        language => language.main_file(),
    };
    text.replace("{{role}}", &role.to_string())
        .replace("{{language}}", &language.to_string())
        .replace("{{install}}", language.install())
        .replace("{{main}}", main)
        .replace("{{does}}", does(role))
        .replace("{{case}}", case)
}

/// What Cargo, npm and the plugin host all take for a name.
fn is_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    name.len() <= 64
        && name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.chars().all(plain)
}
