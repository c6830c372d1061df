//! What rewards that ask a judge have in common: texts with columns filled in, and numbers read out of answers.

use serde_json::{Map, Value};

/// `template` with `{name}` replaced by that column of `row`, or by `completion` for `{completion}`; `{{` and `}}` are
/// braces. A column that is no text stands as JSON.
///
/// # Errors
/// A brace without its other half, and a name that is no column.
pub fn fill(template: &str, row: &Map<String, Value>, completion: &str) -> Result<String, String> {
    let (mut text, mut rest) = (String::new(), template);
    while let Some(at) = rest.find(['{', '}']) {
        let (before, brace) = rest.split_at(at);
        text.push_str(before);
        if brace.starts_with("{{") || brace.starts_with("}}") {
            text.push_str(&brace[..1]);
            rest = &brace[2..];
            continue;
        }
        let name = brace
            .strip_prefix('{')
            .and_then(|inside| inside.split_once('}'));
        let Some((name, after)) = name else {
            return Err(format!("a brace without its other half in `{template}`"));
        };
        match row.get(name) {
            _ if name == "completion" => text.push_str(completion),
            Some(Value::String(value)) => text.push_str(value),
            Some(value) => text.push_str(&value.to_string()),
            None => return Err(format!("row has no column `{name}`")),
        }
        rest = after;
    }
    text.push_str(rest);
    Ok(text)
}

/// What a text says outside of `<think>…</think>`; an open tag without its end takes the rest.
pub fn without_thinking(text: &str) -> String {
    let (mut kept, mut rest) = (String::new(), text);
    while let Some((before, inside)) = rest.split_once("<think>") {
        kept.push_str(before);
        rest = inside.split_once("</think>").map_or("", |(_, after)| after);
    }
    // A prompt may have opened the tag already.
    let rest = rest.split_once("</think>").map_or(rest, |(_, after)| after);
    kept.push_str(rest);
    kept.trim().to_owned()
}

/// The last number of an answer, `7`, `-0.5` or the 7 of `7/10`, if it is within `range` (both included).
pub fn last_number(answer: &str, range: [f64; 2]) -> Option<f64> {
    let part = |c: char| c.is_ascii_digit() || matches!(c, '.' | '-');
    let words = answer.split(|c: char| !part(c) && c != '/');
    // `7/10` is seven of ten.
    let mut numbers = words.filter_map(|word| {
        let first = word.split('/').find(|number| !number.is_empty())?;
        let number: f64 = first.trim_end_matches(['.', '-']).parse().ok()?;
        number.is_finite().then_some(number)
    });
    numbers
        .next_back()
        .filter(|number| (range[0]..=range[1]).contains(number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_filled_in() {
        let row = serde_json::json!({"q": "Why {x}?", "n": [1]});
        let row = row.as_object().unwrap();
        assert_eq!(
            fill("{q} {n} {{a}} {completion}", row, "{q}").unwrap(),
            "Why {x}? [1] {a} {q}"
        );
        assert_eq!(fill("{z}", row, "").unwrap_err(), "row has no column `z`");
        for broken in ["{q", "q}", "{"] {
            assert!(
                fill(broken, row, "").unwrap_err().contains("brace"),
                "{broken}"
            );
        }
    }

    #[test]
    fn thinking_is_left_out() {
        for (text, kept) in [
            ("a", "a"),
            ("<think>1</think> a", "a"),
            ("x <think>1</think>y<think>2", "x y"),
            ("1</think>a", "a"),
            ("<think>1", ""),
        ] {
            assert_eq!(without_thinking(text), kept, "{text}");
        }
    }

    #[test]
    fn the_last_number_within_its_range() {
        for (answer, number) in [
            ("Score: 7", Some(7.0)),
            ("3 of 5 hold, so **4.5**.", Some(4.5)),
            ("7/10", Some(7.0)),
            ("I give it 8 - good", Some(8.0)),
            ("-1", None),
            ("11", None),
            ("none", None),
            ("", None),
            ("...", None),
            ("1e999", None),
        ] {
            assert_eq!(last_number(answer, [0.0, 10.0]), number, "{answer}");
        }
    }
}
