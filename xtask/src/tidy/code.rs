//! Just enough Rust lexing for the rules: blanking of comments and strings, words, `use` paths.

/// Replaces the insides of comments, strings and character literals by spaces; newlines stay.
pub(super) fn without_comments_and_strings(text: &str) -> String {
    let mut code = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let before = code.chars().next_back();
        let length = opaque_length(rest, before);
        let (token, after) = rest.split_at(length.unwrap_or(c.len_utf8()));
        match length {
            Some(_) => code.extend(token.chars().map(|c| if c == '\n' { c } else { ' ' })),
            None => code.push(c),
        }
        rest = after;
    }
    code
}

/// Length of the comment or literal at the start of `rest`, if one starts here.
fn opaque_length(rest: &str, before: Option<char>) -> Option<usize> {
    let until = |end: &str, from: usize| {
        rest[from..]
            .find(end)
            .map_or(rest.len(), |at| from + at + end.len())
    };
    if rest.starts_with("//") {
        return Some(rest.find('\n').unwrap_or(rest.len()));
    }
    if rest.starts_with("/*") {
        return Some(until("*/", 2));
    }
    if rest.starts_with('"') {
        return Some(quoted_length(rest));
    }
    if rest.starts_with('\'') {
        return char_length(rest);
    }
    let inside_word = before.is_some_and(is_word);
    if !inside_word && rest.starts_with('r') {
        let hashes = rest[1..].bytes().take_while(|b| *b == b'#').count();
        if rest[1 + hashes..].starts_with('"') {
            return Some(until(&format!("\"{}", "#".repeat(hashes)), 2 + hashes));
        }
    }
    None
}

fn quoted_length(rest: &str) -> usize {
    let mut escaped = false;
    for (at, c) in rest.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return at + 1,
            _ => {}
        }
    }
    rest.len()
}

/// `'x'` and `'\n'` are literals; `'a` is a lifetime.
fn char_length(rest: &str) -> Option<usize> {
    let inner = &rest[1..];
    if inner.starts_with('\\') {
        // From 2 on, so that `'\''` does not end at its escaped quote.
        return inner.get(2..)?.find('\'').map(|at| 1 + 2 + at + 1);
    }
    let c = inner.chars().next()?;
    inner[c.len_utf8()..]
        .starts_with('\'')
        .then_some(1 + c.len_utf8() + 1)
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Whether `word` occurs as a whole word.
pub(super) fn has_word(code: &str, word: &str) -> bool {
    starts_of(code, word).next().is_some()
}

/// Offsets behind each whole-word occurrence of `word`.
pub(super) fn starts_of<'a>(code: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    code.match_indices(word).filter_map(move |(at, _)| {
        let end = at + word.len();
        let free = !code[..at].ends_with(is_word) && !code[end..].starts_with(is_word);
        free.then_some(end)
    })
}

/// First names below `crate`: `crate::a::b` and `use crate::{a, b::c}` give `a` and `a`, `b`.
pub(super) fn crate_rooms(code: &str) -> Vec<&str> {
    let mut rooms = Vec::new();
    for end in starts_of(code, "crate") {
        let Some(path) = code[end..].strip_prefix("::") else {
            continue;
        };
        match path.strip_prefix('{') {
            Some(group) => rooms.extend(heads(group)),
            None => rooms.extend(first_word(path)),
        }
    }
    rooms
}

/// First word of each item of a braced list that has just been opened.
fn heads(group: &str) -> Vec<&str> {
    let mut found = Vec::new();
    let mut depth = 0;
    let mut item = 0;
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth > 0 => depth -= 1,
            ',' if depth == 0 => {
                found.extend(first_word(&group[item..at]));
                item = at + 1;
            }
            '}' => {
                found.extend(first_word(&group[item..at]));
                break;
            }
            _ => {}
        }
    }
    found
}

/// The word `text` starts with, after white space.
pub(super) fn first_word(text: &str) -> Option<&str> {
    let text = text.trim_start();
    let end = text.find(|c| !is_word(c)).unwrap_or(text.len());
    (end > 0).then(|| &text[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_literals_are_blanked() {
        for (text, code) in [
            ("a // unsafe\nb", "a          \nb"),
            ("a /* x\ny */ b", "a     \n     b"),
            (r#"f("un\"safe") g"#, "f(          ) g"),
            ("r#\"a\"b\"# c", "         c"),
            ("'\\'' 'a' <'a> '\"' x", "         <'a>     x"),
        ] {
            assert_eq!(without_comments_and_strings(text), code, "{text}");
        }
    }

    #[test]
    fn rooms_of_plain_and_grouped_paths() {
        let code = "use crate::{plugin::{Limits, data}, grpo, types};\nlet x = crate::run::open(); pub(crate) fn";
        assert_eq!(crate_rooms(code), ["plugin", "grpo", "types", "run"]);
    }

    #[test]
    fn words_are_whole() {
        assert!(has_word("use tokio::main", "tokio"));
        assert!(!has_word("use tokiox; my_tokio", "tokio"));
    }
}
