//! One key inside of a map, as the command line names it: `judges.strict.max_requests`.

use serde_norway::{Mapping, Value};

/// The keys that `dotted` goes through below `known`. A name that a map has goes before its parts: those of judges may have
/// dots.
pub(super) fn path(known: Option<&Value>, dotted: &str) -> Vec<String> {
    let (mut known, mut rest, mut keys) = (known, dotted, Vec::new());
    loop {
        let map = known.and_then(Value::as_mapping);
        let names = map.into_iter().flat_map(Mapping::keys);
        let leads = |name: &&str| {
            let after = rest.strip_prefix(*name);
            after.is_some_and(|after| after.is_empty() || after.starts_with('.'))
        };
        let longest = names
            .filter_map(Value::as_str)
            .filter(leads)
            .max_by_key(|name| name.len());
        let first = rest.split('.').next().unwrap_or(rest);
        let name = longest.unwrap_or(first);
        keys.push(name.to_owned());
        known = map.and_then(|map| map.get(name));
        match rest[name.len()..].strip_prefix('.') {
            Some(after) => rest = after,
            None => return keys,
        }
    }
}

/// `known` with `value` at `path`, and everything else as it was.
///
/// # Errors
/// How many keys of the path lead to something that is neither a map nor `null`.
pub(super) fn with(known: Option<&Value>, path: &[String], value: Value) -> Result<Value, usize> {
    let Some((first, rest)) = path.split_first() else {
        return Ok(value);
    };
    let mut map = match known {
        None | Some(Value::Null) => Mapping::new(),
        Some(Value::Mapping(map)) => map.clone(),
        Some(_) => return Err(0),
    };
    let inner = with(map.get(first.as_str()), rest, value).map_err(|keys| keys + 1)?;
    map.insert(Value::from(first.as_str()), inner);
    Ok(Value::Mapping(map))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn yaml(text: &str) -> Value {
        serde_norway::from_str(text).unwrap()
    }

    #[test]
    fn names_that_are_there_may_have_dots() {
        let judges = yaml("{gpt-4.1: {model: m}, gpt-4: {model: m}}");
        for (dotted, keys) in [
            ("gpt-4.1.max_requests", vec!["gpt-4.1", "max_requests"]),
            ("gpt-4.max_requests", vec!["gpt-4", "max_requests"]),
            ("gpt-4.2.max_requests", vec!["gpt-4", "2", "max_requests"]),
            ("new.extra.seed", vec!["new", "extra", "seed"]),
            ("gpt-4.", vec!["gpt-4", ""]),
        ] {
            assert_eq!(path(Some(&judges), dotted), keys, "{dotted}");
        }
        assert_eq!(path(None, "a.b"), ["a", "b"]);
    }

    #[test]
    fn only_the_value_at_the_path_changes() {
        let known = yaml("{a: {x: 1, y: {z: 2}}, b: null}");
        let set = |dotted: &str, value: &str| {
            with(Some(&known), &path(Some(&known), dotted), yaml(value))
        };
        assert_eq!(
            set("a.x", "[3]"),
            Ok(yaml("{a: {x: [3], y: {z: 2}}, b: null}"))
        );
        assert_eq!(
            set("a.y", "{q: 1}"),
            Ok(yaml("{a: {x: 1, y: {q: 1}}, b: null}"))
        );
        assert_eq!(
            set("b.c.d", "1"),
            Ok(yaml("{a: {x: 1, y: {z: 2}}, b: {c: {d: 1}}}"))
        );
        assert_eq!(set("a.x.q", "1"), Err(2));
        assert_eq!(
            with(None, &path(None, "a.b"), yaml("1")),
            Ok(yaml("{a: {b: 1}}"))
        );
    }
}
