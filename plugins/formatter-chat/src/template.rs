//! Templates with `{column}` holes, `{{` and `}}` for braces.

use serde_json::{Map, Value};

/// A template, parsed once.
#[derive(Clone, Debug, PartialEq)]
pub struct Template {
    pieces: Vec<Piece>,
}

#[derive(Clone, Debug, PartialEq)]
enum Piece {
    Text(String),
    Column(String),
}

impl Template {
    /// Parses a template; the error shows the part that is not closed or not opened.
    pub fn new(text: &str) -> Result<Self, String> {
        let mut pieces = Vec::new();
        let mut literal = String::new();
        let mut rest = text;
        while let Some(at) = rest.find(['{', '}']) {
            literal.push_str(&rest[..at]);
            let tail = &rest[at..];
            if let Some(after) = tail.strip_prefix("{{") {
                literal.push('{');
                rest = after;
            } else if let Some(after) = tail.strip_prefix("}}") {
                literal.push('}');
                rest = after;
            } else if let Some((name, after)) =
                tail.strip_prefix('{').and_then(|t| t.split_once('}'))
            {
                if name.is_empty() || name.contains('{') {
                    return Err(format!("template `{text}`: `{{{name}}}` names no column"));
                }
                pieces.push(Piece::Text(std::mem::take(&mut literal)));
                pieces.push(Piece::Column(name.to_owned()));
                rest = after;
            } else {
                return Err(format!(
                    "template `{text}`: lone brace at `{tail}`; write it twice"
                ));
            }
        }
        literal.push_str(rest);
        pieces.push(Piece::Text(literal));
        Ok(Self { pieces })
    }

    /// Fills the holes: strings as they are, other values as JSON.
    pub fn fill(&self, row: &Map<String, Value>) -> Result<String, String> {
        let mut out = String::new();
        for piece in &self.pieces {
            match piece {
                Piece::Text(text) => out.push_str(text),
                Piece::Column(name) => match row.get(name) {
                    Some(Value::String(text)) => out.push_str(text),
                    Some(value) => out.push_str(&value.to_string()),
                    None => {
                        let found = row
                            .keys()
                            .map(String::as_str)
                            .collect::<Vec<_>>()
                            .join(", ");
                        return Err(format!("row has no column `{name}`; it has {found}"));
                    }
                },
            }
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(template: &str, row: &str) -> Result<String, String> {
        let Ok(Value::Object(row)) = serde_json::from_str(row) else {
            panic!("{row}")
        };
        Template::new(template)?.fill(&row)
    }

    #[test]
    fn holes_and_braces() {
        let row = r#"{"a": "x{b}", "b": [1, 2]}"#;
        assert_eq!(fill("{a} and {b}", row).unwrap(), "x{b} and [1,2]");
        assert_eq!(fill("\\boxed{{{b}}}", row).unwrap(), "\\boxed{[1,2]}");
        assert_eq!(fill("", row).unwrap(), "");
    }

    #[test]
    fn errors_show_the_place() {
        assert_eq!(
            fill("{c}", r#"{"a": 1, "b": 2}"#).unwrap_err(),
            "row has no column `c`; it has a, b"
        );
        assert!(
            Template::new("x } y")
                .unwrap_err()
                .contains("lone brace at `} y`")
        );
        assert!(
            Template::new("x {y")
                .unwrap_err()
                .contains("lone brace at `{y`")
        );
        assert!(
            Template::new("{}")
                .unwrap_err()
                .contains("`{}` names no column")
        );
    }
}
