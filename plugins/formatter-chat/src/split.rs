//! Reads reasoning and answer out of a completion.

use serde::Deserialize;

/// Where the reasoning and the answer stand.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Marks {
    /// Begins the reasoning. May be missing from the completion when the prompt ends with it.
    pub think_open: String,
    /// Ends the reasoning.
    pub think_close: String,
    /// Tag around the answer, such as `answer`. Without it, all that is not reasoning is the answer.
    pub answer_tag: Option<String>,
}

impl Default for Marks {
    fn default() -> Self {
        Self {
            think_open: "<think>".to_owned(),
            think_close: "</think>".to_owned(),
            answer_tag: None,
        }
    }
}

/// What was found, blanks around it cut off. Empty texts are not found.
#[derive(Debug, PartialEq, Eq)]
pub struct Split<'a> {
    pub reasoning: Option<&'a str>,
    pub answer: Option<&'a str>,
}

impl Marks {
    /// Splits at the last closing mark. A completion cut off while thinking has no answer.
    pub fn split<'a>(&self, completion: &'a str) -> Split<'a> {
        let (thinking, rest) = match completion.rsplit_once(self.think_close.as_str()) {
            Some((thinking, rest)) => (Some(thinking), Some(rest)),
            None if completion.contains(self.think_open.as_str()) => (Some(completion), None),
            None => (None, Some(completion)),
        };
        let open = |t: &'a str| {
            t.split_once(self.think_open.as_str())
                .map_or(t, |(_, inside)| inside)
        };
        Split {
            reasoning: thinking.map(open).and_then(filled),
            answer: rest.and_then(|r| self.tagged(r)).and_then(filled),
        }
    }

    fn tagged<'a>(&self, text: &'a str) -> Option<&'a str> {
        let Some(tag) = &self.answer_tag else {
            return Some(text);
        };
        let (_, inside) = text.rsplit_once(&format!("<{tag}>"))?;
        inside
            .split_once(&format!("</{tag}>"))
            .map(|(answer, _)| answer)
    }
}

fn filled(text: &str) -> Option<&str> {
    Some(text.trim()).filter(|t| !t.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shape_of_thinking() {
        let marks = Marks::default();
        for (completion, reasoning, answer) in [
            ("<think>a</think> 42\n", Some("a"), Some("42")),
            ("a</think>42", Some("a"), Some("42")),
            ("42", None, Some("42")),
            ("<think>a", Some("a"), None),
            ("<think></think>", None, None),
            ("<think>a</think>b</think>c", Some("a</think>b"), Some("c")),
            ("", None, None),
        ] {
            assert_eq!(
                marks.split(completion),
                Split { reasoning, answer },
                "{completion}"
            );
        }
    }

    #[test]
    fn the_last_answer_tag_counts() {
        let marks = Marks {
            answer_tag: Some("answer".to_owned()),
            ..Marks::default()
        };
        let split = marks
            .split("<think><answer>1</answer></think>x<answer>2</answer>y<answer> 3 </answer>z");
        assert_eq!(split.answer, Some("3"));
        assert_eq!(marks.split("42").answer, None);
        assert_eq!(marks.split("<answer>42").answer, None);
    }
}
