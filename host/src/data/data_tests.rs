//! Reading, renaming, checking and splitting rows.

use std::{fs, path::Path};

use serde_json::json;

use super::*;

fn file(folder: &tempfile::TempDir, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
    let path = folder.path().join(name);
    fs::write(&path, text).unwrap();
    path
}

fn rows(dataset: &Dataset) -> Vec<serde_json::Value> {
    dataset
        .rows
        .iter()
        .map(|row| row.json.clone().into())
        .collect()
}

fn fails(path: &Path, options: &LoadOptions) -> String {
    load(path, options).unwrap_err().to_string()
}

#[test]
fn jsonl_keeps_order_and_skips_blank_lines() {
    let dir = tempfile::tempdir().unwrap();
    let path = file(
        &dir,
        "d.jsonl",
        "\u{feff}{\"a\":1,\"b\":2}\n\n  \n{\"a\":\"x\"}\r\n{\"a\":null}",
    );
    let data = load(&path, &LoadOptions::default()).unwrap();
    assert_eq!(
        rows(&data),
        [
            json!({"a": 1, "b": 2}),
            json!({"a": "x"}),
            json!({"a": null})
        ]
    );
    assert_eq!(
        data.rows.iter().map(|r| r.id).collect::<Vec<_>>(),
        [0, 1, 2]
    );
    let two = LoadOptions {
        limit: Some(2),
        ..LoadOptions::default()
    };
    assert_eq!(load(&path, &two).unwrap().rows.len(), 2);
}

#[test]
fn a_json_array_is_rows_too() {
    let dir = tempfile::tempdir().unwrap();
    let array = file(&dir, "d.json", "[{\"a\":1},\n {\"a\":2}]");
    assert_eq!(
        rows(&load(&array, &LoadOptions::default()).unwrap()),
        [json!({"a":1}), json!({"a":2})]
    );
    let lines = file(&dir, "l.json", "{\"a\":1}\n{\"a\":2}\n");
    assert_eq!(load(&lines, &LoadOptions::default()).unwrap().rows.len(), 2);
}

#[test]
fn malformed_lines_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = file(&dir, "bad.jsonl", "{\"a\":1}\n\n{\"a\":1,}\n");
    let text = fails(&path, &LoadOptions::default());
    assert!(
        text.ends_with("bad.jsonl line 3: trailing comma at column 8"),
        "{text}"
    );
    let path = file(&dir, "list.jsonl", "{}\n[1]\n");
    let text = fails(&path, &LoadOptions::default());
    assert!(
        text.ends_with("list.jsonl line 2: a row must be a JSON object, found an array"),
        "{text}"
    );
    let path = file(&dir, "latin.jsonl", b"{\"a\":\"\xe9\"}\n");
    let text = fails(&path, &LoadOptions::default());
    assert!(
        text.contains("line 1: invalid unicode code point"),
        "{text}"
    );
    let path = file(&dir, "doc.json", "[{\"a\":1},\n{\"a\":}]");
    let text = fails(&path, &LoadOptions::default());
    assert!(text.contains("doc.json line 2: expected value"), "{text}");
}

#[test]
fn missing_empty_and_unknown_files() {
    let dir = tempfile::tempdir().unwrap();
    let options = LoadOptions::default();
    let error = load(&dir.path().join("no.jsonl"), &options).unwrap_err();
    assert!(matches!(&error, DataError::NotFound { path } if path.ends_with("no.jsonl")));
    assert!(error.hint().unwrap().contains(".parquet"));
    let empty = file(&dir, "empty.jsonl", "\n\n");
    assert!(fails(&empty, &options).ends_with("empty.jsonl has no rows"));
    let csv = file(&dir, "d.csv", "a,b\n");
    assert!(matches!(
        load(&csv, &options).unwrap_err(),
        DataError::UnknownFormat { .. }
    ));
    let broken = file(&dir, "d.parquet", "PAR1 but not really");
    assert!(matches!(
        load(&broken, &options).unwrap_err(),
        DataError::Parquet { .. }
    ));
}

#[test]
fn columns_are_renamed_in_place() {
    let options = |pairs: &[(&str, &str)]| LoadOptions {
        rename: pairs
            .iter()
            .map(|(a, b)| ((*a).to_owned(), (*b).to_owned()))
            .collect(),
        ..LoadOptions::default()
    };
    let text = r#"{"problem":"1+1","solution":"2","level":3}"#;
    let map = options(&[("question", "problem"), ("answer", "solution")]);
    let data = parse_jsonl(text, "mem", &map).unwrap();
    let got = serde_json::to_string(&data.rows[0].json).unwrap();
    assert_eq!(got, r#"{"question":"1+1","answer":"2","level":3}"#);
    // A column may take the place of another, also crosswise.
    let swap = options(&[("a", "b"), ("b", "a")]);
    let data = parse_jsonl(r#"{"a":1,"b":2}"#, "mem", &swap).unwrap();
    assert_eq!(rows(&data), [json!({"a": 2, "b": 1})]);
    let over = options(&[("a", "b")]);
    let data = parse_jsonl(r#"{"a":1,"b":2}"#, "mem", &over).unwrap();
    assert_eq!(rows(&data), [json!({"a": 2})]);
}

#[test]
fn a_missing_column_lists_the_ones_found() {
    let required = LoadOptions {
        required: vec!["answer".into()],
        ..LoadOptions::default()
    };
    let text = "{\"answer\":1}\n{\"problem\":2,\"solution\":3}";
    let error = parse_jsonl(text, "mem", &required).unwrap_err();
    assert_eq!(
        error.to_string(),
        "row 1 of mem has no column `answer`; columns found: problem, solution"
    );
    assert!(
        error
            .hint()
            .unwrap()
            .contains("columns: {question: problem}")
    );
    let map = LoadOptions {
        rename: [("question".to_owned(), "prompt".to_owned())].into(),
        ..LoadOptions::default()
    };
    let error = parse_jsonl("{\"problem\":2}", "mem", &map).unwrap_err();
    assert_eq!(
        error.to_string(),
        "row 0 of mem has no column `prompt`; columns found: problem"
    );
}

#[test]
fn folders_are_read_in_the_order_of_names() {
    let dir = tempfile::tempdir().unwrap();
    file(&dir, "b.jsonl", "{\"n\":2}");
    file(&dir, "a.jsonl", "{\"n\":0}\n{\"n\":1}");
    file(&dir, "README.md", "not data");
    let data = load(dir.path(), &LoadOptions::default()).unwrap();
    assert_eq!(
        rows(&data),
        [json!({"n":0}), json!({"n":1}), json!({"n":2})]
    );
    assert_eq!(data.rows[2].id, 2);
}

#[test]
fn parquet_values_become_json() {
    use ::parquet::{
        data_type::{ByteArray, ByteArrayType, Int64Type},
        file::writer::SerializedFileWriter,
        schema::parser::parse_message_type,
    };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("d.parquet");
    let schema = parse_message_type(
        "message m { REQUIRED BYTE_ARRAY question (STRING); OPTIONAL INT64 n;
         REQUIRED GROUP tags (LIST) { REPEATED GROUP list { REQUIRED BYTE_ARRAY element (STRING); } } }",
    );
    let out = fs::File::create(&path).unwrap();
    let mut writer =
        SerializedFileWriter::new(out, schema.unwrap().into(), Default::default()).unwrap();
    let mut group = writer.next_row_group().unwrap();
    let text = |s: &str| ByteArray::from(s);
    let mut column = group.next_column().unwrap().unwrap();
    column
        .typed::<ByteArrayType>()
        .write_batch(&[text("ä"), text("b")], None, None)
        .unwrap();
    column.close().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    column
        .typed::<Int64Type>()
        .write_batch(&[7], Some(&[0, 1]), None)
        .unwrap();
    column.close().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    let tags = [text("x"), text("y")];
    column
        .typed::<ByteArrayType>()
        .write_batch(&tags, Some(&[1, 1, 0]), Some(&[0, 1, 0]))
        .unwrap();
    column.close().unwrap();
    group.close().unwrap();
    writer.close().unwrap();

    let data = load(&path, &LoadOptions::default()).unwrap();
    assert_eq!(
        rows(&data),
        [
            json!({"question": "ä", "n": null, "tags": ["x", "y"]}),
            json!({"question": "b", "n": 7, "tags": []}),
        ]
    );
    let one = LoadOptions {
        limit: Some(1),
        ..LoadOptions::default()
    };
    assert_eq!(load(&path, &one).unwrap().rows.len(), 1);
}

#[test]
fn the_split_is_a_function_of_the_seed() {
    let text: String = (0..100).map(|i| format!("{{\"n\":{i}}}\n")).collect();
    let data = parse_jsonl(&text, "mem", &LoadOptions::default()).unwrap();
    let numbers = |d: &Dataset| -> Vec<i64> {
        d.rows
            .iter()
            .map(|r| r.json["n"].as_i64().unwrap())
            .collect()
    };
    let (train, eval) = data.clone().split(20, 7).unwrap();
    let (_, again) = data.clone().split(20, 7).unwrap();
    let (_, other) = data.clone().split(20, 8).unwrap();
    assert_eq!(numbers(&eval), numbers(&again));
    assert_ne!(numbers(&eval), numbers(&other));
    assert!(numbers(&eval).is_sorted() && numbers(&train).is_sorted());
    let mut all = numbers(&train);
    all.extend(numbers(&eval));
    all.sort_unstable();
    assert_eq!(all, (0..100).collect::<Vec<i64>>());
    assert!(
        train
            .rows
            .iter()
            .enumerate()
            .all(|(i, row)| row.id == i as u64)
    );
    // A larger part for evaluation contains the smaller one.
    let (_, more) = data.clone().split(30, 7).unwrap();
    assert!(numbers(&eval).iter().all(|n| numbers(&more).contains(n)));
    assert!(matches!(
        data.split(100, 7),
        Err(DataError::SplitTooLarge { rows: 100, .. })
    ));
}

#[test]
fn arguments_are_paths_or_ids() {
    let hub = |id: &str, revision: Option<&str>| Source::Hub {
        id: id.to_owned(),
        revision: revision.map(str::to_owned),
    };
    assert_eq!(Source::parse("openai/gsm8k"), hub("openai/gsm8k", None));
    assert_eq!(
        Source::parse("org/name@v1.0"),
        hub("org/name", Some("v1.0"))
    );
    for path in [
        "data/train.jsonl",
        "./org/name",
        "/tmp/x",
        "a/b/c",
        "../name",
        "rows.parquet",
    ] {
        assert_eq!(Source::parse(path), Source::Path(path.into()), "{path}");
    }
}
