//! The wrapper's config, and the inner reward's score and the cost terms as one.

use inference_cost::{Terms, Weights, finite};
use serde::Deserialize;
use serde_json::value::RawValue;

/// Put before the name of an inner part that a part of the wrapper has already.
const INNER: &str = "inner/";

/// The wrapper's config.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The config of the inner reward. Text, so that no number changes on its way through.
    pub inner: Option<Box<RawValue>>,
    /// The weights of the cost terms.
    pub inference: Weights,
    /// The weight of the inner reward's total; 0 leaves it out of the sum.
    pub task_weight: f64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            inner: None,
            inference: Weights::default(),
            task_weight: 1.0,
        }
    }
}

impl Config {
    /// Reads the JSON object of `configure`; the error says which key is wrong.
    pub fn parse(json: &str) -> Result<Self, String> {
        let config: Self = serde_json::from_str(json).map_err(|e| e.to_string())?;
        finite("task_weight", config.task_weight)?;
        config
            .inference
            .check()
            .map_err(|e| format!("inference: {e}"))?;
        Ok(config)
    }

    /// The JSON object for the inner reward's `configure`.
    pub fn inner_json(&self) -> &str {
        self.inner.as_deref().map_or("{}", RawValue::get)
    }

    /// `task_weight·task + terms`. Parts: `task`, the inner total before its weight; the terms; the
    /// inner parts, under their own names where those are free.
    pub fn join(
        &self,
        task: f64,
        inner: Vec<(String, f64)>,
        terms: Terms,
    ) -> (f64, Vec<(String, f64)>) {
        let total = self.task_weight * task + terms.total;
        let mut parts = vec![("task".to_owned(), task)];
        parts.extend(terms.parts.into_iter().map(|(n, v)| (n.to_owned(), v)));
        let own = parts.len();
        for (name, value) in &inner {
            let mut unique = name.clone();
            // A prefixed name can be that of another inner part, which has the older claim to it.
            while has(&parts[..own], &unique) || (unique != *name && has(&inner, &unique)) {
                unique.insert_str(0, INNER);
            }
            parts.push((unique, *value));
        }
        (total, parts)
    }
}

fn has(parts: &[(String, f64)], wanted: &str) -> bool {
    parts.iter().any(|(name, _)| name == wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn terms(parts: &[(&'static str, f64)]) -> Terms {
        Terms {
            total: -0.5,
            parts: parts.to_vec(),
        }
    }

    #[test]
    fn totals_add_up_and_names_stay_unique() {
        let config = Config::parse(r#"{"task_weight": 2}"#).unwrap();
        let inner = [
            ("strict", 1.0),
            ("task", 2.0),
            ("inner/task", 3.0),
            ("kv_mb", 4.0),
        ];
        let inner = inner.map(|(n, v)| (n.to_owned(), v)).to_vec();
        let (total, parts) = config.join(0.75, inner, terms(&[("kv_mb", 9.0)]));
        assert_eq!(total, 1.0);
        let parts: Vec<_> = parts.iter().map(|(n, v)| (n.as_str(), *v)).collect();
        assert_eq!(
            parts,
            [
                ("task", 0.75),
                ("kv_mb", 9.0),
                ("strict", 1.0),
                ("inner/inner/task", 2.0),
                ("inner/task", 3.0),
                ("inner/kv_mb", 4.0)
            ]
        );
    }

    #[test]
    fn configs_are_strict() {
        let config =
            r#"{"inner": {"column": 0.10000000000000000001}, "inference": {"kv_weight": 2}}"#;
        let config = Config::parse(config).unwrap();
        assert_eq!(config.inner_json(), r#"{"column": 0.10000000000000000001}"#);
        assert_eq!(Config::parse("{}").unwrap().inner_json(), "{}");
        assert_eq!((config.inference.kv_weight, config.task_weight), (2.0, 1.0));
        let refuse = |json| Config::parse(json).unwrap_err();
        assert!(refuse(r#"{"column": "gold"}"#).contains("unknown field `column`"));
        assert!(refuse(r#"{"inference": {"kv": 2}}"#).contains("unknown field `kv`"));
        assert!(refuse(r#"{"task_weight": "1"}"#).contains("expected f64"));
    }
}
