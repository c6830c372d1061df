//! Which files of a hub dataset hold a split, and loading them.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{
    DataError, Dataset, LoadOptions,
    files::{Format, load_files},
};
use crate::hub::{Hub, Progress, Repo};

/// A dataset on the hub and the part of it that is wanted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HubDataset {
    pub repo: Repo,
    /// Folder of the files (`main` or `socratic` of GSM8K). Unset: `main`, `default` or the only one.
    pub subset: Option<String>,
    /// `train`, `test`, …
    pub split: String,
}

/// Downloads the files of the split (or finds them in the cache) and loads their rows.
pub fn load_hub(
    hub: &Hub,
    dataset: &HubDataset,
    options: &LoadOptions,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Dataset, DataError> {
    let snapshot = hub.resolve(&dataset.repo)?;
    let names = split_files(&snapshot.files, dataset)?;
    let mut paths = Vec::with_capacity(names.len());
    for name in &names {
        paths.push(hub.file(&snapshot, name, progress)?);
    }
    let source = format!("{}:{}", dataset.repo.id, dataset.split);
    load_files(&paths, source, options)
}

/// The data files of a split in the order of their names. Parquet wins over JSON when a repository has
/// both, since then one is a conversion of the other.
fn split_files(files: &[String], dataset: &HubDataset) -> Result<Vec<String>, DataError> {
    let mut data: Vec<&String> = files.iter().filter(|f| is_data(f)).collect();
    data.sort();
    let mut chosen: Vec<&String> = data
        .iter()
        .copied()
        .filter(|f| holds_split(f, &dataset.split))
        .collect();
    let names_any_split = |f: &&String| {
        ["train", "test", "validation"]
            .iter()
            .any(|s| holds_split(f, s))
    };
    if chosen.is_empty() && dataset.split == "train" && !data.iter().any(names_any_split) {
        // Without any split in the names, everything is training data.
        chosen.clone_from(&data);
    }
    let chosen = one_subset(chosen, dataset)?;
    let best = chosen.iter().filter_map(|f| Format::of(Path::new(f))).min();
    let chosen: Vec<String> = chosen
        .into_iter()
        .filter(|f| Format::of(Path::new(f)) == best)
        .cloned()
        .collect();
    if chosen.is_empty() {
        return Err(DataError::NoSplit {
            id: dataset.repo.id.clone(),
            split: dataset.split.clone(),
            found: data.into_iter().cloned().collect(),
        });
    }
    Ok(chosen)
}

fn is_data(file: &str) -> bool {
    let hidden = file.split('/').any(|part| part.starts_with('.'));
    let metadata = ["dataset_infos.json", "config.json"].contains(&file);
    !hidden && !metadata && Format::of(Path::new(file)).is_some()
}

/// `train.parquet`, `train-00000-of-00002.parquet`, `gsm8k_train.jsonl` or any file in a folder `train`.
fn holds_split(file: &str, split: &str) -> bool {
    let (folders, name) = file.rsplit_once('/').unwrap_or(("", file));
    let words = name.split(['-', '.', '_']);
    folders.split('/').any(|f| f == split) || words.into_iter().any(|word| word == split)
}

fn one_subset<'a>(
    files: Vec<&'a String>,
    dataset: &HubDataset,
) -> Result<Vec<&'a String>, DataError> {
    let subset = |file: &str| -> String {
        let parts = file
            .rsplit_once('/')
            .map_or("", |(folders, _)| folders)
            .split('/');
        let named = parts.filter(|p| !p.is_empty() && *p != "data" && *p != dataset.split);
        named.collect::<Vec<_>>().join("/")
    };
    let mut subsets: Vec<String> = files.iter().map(|f| subset(f)).collect();
    subsets.sort();
    subsets.dedup();
    let wanted = match &dataset.subset {
        Some(name) => name.clone(),
        None if subsets.len() <= 1 => return Ok(files),
        None => ["main", "default", ""]
            .iter()
            .find(|usual| subsets.iter().any(|s| s == *usual))
            .map(|usual| (*usual).to_owned())
            .ok_or_else(|| DataError::ManySubsets {
                id: dataset.repo.id.clone(),
                subsets: subsets.clone(),
            })?,
    };
    Ok(files.into_iter().filter(|f| subset(f) == wanted).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pick(files: &[&str], subset: Option<&str>, split: &str) -> Result<Vec<String>, DataError> {
        let files: Vec<String> = files.iter().map(|f| (*f).to_owned()).collect();
        let repo = Repo::dataset("org/name");
        let subset = subset.map(str::to_owned);
        split_files(
            &files,
            &HubDataset {
                repo,
                subset,
                split: split.to_owned(),
            },
        )
    }

    const GSM8K: [&str; 6] = [
        ".gitattributes",
        "README.md",
        "main/test-00000-of-00001.parquet",
        "main/train-00000-of-00001.parquet",
        "socratic/test-00000-of-00001.parquet",
        "socratic/train-00000-of-00001.parquet",
    ];

    #[test]
    fn the_main_subset_is_the_default() {
        assert_eq!(
            pick(&GSM8K, None, "train").unwrap(),
            ["main/train-00000-of-00001.parquet"]
        );
        let socratic = pick(&GSM8K, Some("socratic"), "test").unwrap();
        assert_eq!(socratic, ["socratic/test-00000-of-00001.parquet"]);
    }

    #[test]
    fn shards_come_in_order_and_parquet_wins() {
        let files = [
            "data/train-1.parquet",
            "data/train-0.parquet",
            "train.jsonl",
            "data/test.jsonl",
        ];
        let got = pick(&files, None, "train").unwrap();
        assert_eq!(got, ["data/train-0.parquet", "data/train-1.parquet"]);
    }

    #[test]
    fn a_folder_may_name_the_split() {
        let files = [
            "data/test/0.parquet",
            "data/train/0.parquet",
            "dataset_infos.json",
        ];
        assert_eq!(pick(&files, None, "test").unwrap(), ["data/test/0.parquet"]);
    }

    #[test]
    fn files_without_a_split_are_training_data() {
        assert_eq!(
            pick(&["rows.jsonl"], None, "train").unwrap(),
            ["rows.jsonl"]
        );
        let error = pick(&["rows.jsonl"], None, "test").unwrap_err();
        assert!(
            error
                .to_string()
                .contains("no split `test`; data files found: rows.jsonl")
        );
    }

    #[test]
    fn several_unusual_subsets_must_be_named() {
        let error = pick(&["a/train.jsonl", "b/train.jsonl"], None, "train").unwrap_err();
        assert!(matches!(error, DataError::ManySubsets { subsets, .. } if subsets == ["a", "b"]));
    }
}
