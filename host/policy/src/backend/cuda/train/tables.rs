//! What the kernels of training are told of a packed batch: positions, tiles of attention, scored tokens, and which tokens
//! share a row of the embedding. Device-free.

use std::collections::BTreeMap;

use crate::types::{PackedBatch, Span};

/// Tokens of a tile of attention (train_attention.cu).
pub(super) const TILE: usize = 128;

/// Words that a field starts at a multiple of: whole int4s.
const STEP: usize = 4;

/// A table in the one array that is uploaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Field {
    /// Tokens, `[T]`.
    Ids,
    /// Of each token in its sequence, prefix included, `[T]`.
    Positions,
    /// `[S, 4]`: first token, tokens, and of the prefix that it continues the same.
    Sequences,
    /// `[query tiles, 2]`: sequence, first token within it.
    QueryTiles,
    /// `[key tiles, 4]`: first key, keys, end of the tokens that see them, 0.
    KeyTiles,
    /// Of each scored token the one whose hidden state predicts it, `[R]`.
    Predictors,
    /// Scored tokens, `[R]`.
    Targets,
    /// 0, 1, …, `T`.
    Counting,
    /// The distinct tokens of the batch, rising, `[U]`; where the places of each begin, `[U + 1]`; and the places, `[T]`.
    Distinct,
    DistinctStarts,
    DistinctPlaces,
    /// The distinct predictors, rising, `[P]`; where the rows of each begin, `[P + 1]`; and the rows, `[R]`.
    Predicting,
    PredictingStarts,
    PredictingRows,
}

const FIELDS: usize = 14;

/// See the file header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Tables {
    pub(super) words: Vec<i32>,
    starts: [usize; FIELDS],
    pub(super) tokens: usize,
    pub(super) scored: usize,
    pub(super) query_tiles: usize,
    pub(super) key_tiles: usize,
    pub(super) distinct: usize,
    /// Distinct predictors.
    pub(super) predicting: usize,
}

impl Tables {
    /// Of a batch that has passed its checks.
    pub(super) fn new(batch: &PackedBatch) -> Self {
        let spans = batch.spans();
        let (query, key) = (query_tiles(&spans), key_tiles(&spans));
        let predictors = batch.predictors();
        let tokens = Lists::of(batch.ids.iter().map(|id| *id as usize));
        let predicting = Lists::of(predictors.iter().copied());
        let numbers = |list: &mut dyn Iterator<Item = usize>| list.map(|n| n as i32).collect();
        let sequences = spans.iter().flat_map(|Span { tokens, prefix }| {
            [tokens.start, tokens.len(), prefix.start, prefix.len()]
        });
        let fields: [Vec<i32>; FIELDS] = [
            numbers(&mut batch.ids.iter().map(|id| *id as usize)),
            numbers(&mut batch.positions().into_iter()),
            numbers(&mut sequences.into_iter()),
            numbers(&mut query.iter().flatten().copied()),
            numbers(&mut key.iter().flatten().copied()),
            numbers(&mut predictors.iter().copied()),
            numbers(&mut batch.targets().map(|t| batch.ids[t] as usize)),
            numbers(&mut (0..=batch.ids.len())),
            numbers(&mut tokens.keys()),
            numbers(&mut tokens.starts()),
            numbers(&mut tokens.places()),
            numbers(&mut predicting.keys()),
            numbers(&mut predicting.starts()),
            numbers(&mut predicting.places()),
        ];
        let (mut words, mut starts) = (Vec::new(), [0; FIELDS]);
        for (field, start) in fields.iter().zip(&mut starts) {
            words.resize(words.len().next_multiple_of(STEP), 0);
            *start = words.len();
            words.extend_from_slice(field);
        }
        Self {
            words,
            starts,
            tokens: batch.ids.len(),
            scored: predictors.len(),
            query_tiles: query.len(),
            key_tiles: key.len(),
            distinct: tokens.0.len(),
            predicting: predicting.0.len(),
        }
    }

    /// Of a field in `words`, in bytes.
    pub(super) fn offset(&self, field: Field) -> u64 {
        (self.starts[field as usize] * size_of::<i32>()) as u64
    }
}

/// Those that see most first, so that no long one is left for the end.
fn query_tiles(spans: &[Span]) -> Vec<[usize; 2]> {
    let tiles = |(index, span): (usize, &Span)| {
        let firsts = (0..span.tokens.len()).step_by(TILE);
        firsts.map(move |first| [index, first])
    };
    let mut all: Vec<[usize; 2]> = spans.iter().enumerate().flat_map(tiles).collect();
    all.sort_by_key(|[index, first]| std::cmp::Reverse(spans[*index].prefix.len() + first));
    all
}

/// Those that most see first. The keys of a prefix are seen up to the end of the last sequence that continues it.
fn key_tiles(spans: &[Span]) -> Vec<[usize; 4]> {
    let mut ends: Vec<usize> = spans.iter().map(|span| span.tokens.end).collect();
    for span in spans.iter().filter(|span| !span.prefix.is_empty()) {
        if let Some(prefix) = spans.iter().position(|s| s.tokens == span.prefix) {
            ends[prefix] = span.tokens.end;
        }
    }
    let tiles = |(span, end): (&Span, usize)| {
        let own = span.tokens.end;
        let firsts = span.tokens.clone().step_by(TILE);
        firsts.map(move |first| [first, TILE.min(own - first), end, 0])
    };
    let mut all: Vec<[usize; 4]> = spans.iter().zip(ends).flat_map(tiles).collect();
    all.sort_by_key(|[first, _, end, _]| std::cmp::Reverse(end - first));
    all
}

/// The places of each number of a list, rising, so that a gradient is summed in one order.
struct Lists(BTreeMap<usize, Vec<usize>>);

impl Lists {
    fn of(list: impl Iterator<Item = usize>) -> Self {
        let mut places = BTreeMap::<usize, Vec<usize>>::new();
        for (place, number) in list.enumerate() {
            places.entry(number).or_default().push(place);
        }
        Self(places)
    }

    fn keys(&self) -> impl Iterator<Item = usize> {
        self.0.keys().copied()
    }

    /// Where the places of each key begin, and the end.
    fn starts(&self) -> impl Iterator<Item = usize> {
        let ends = self.0.values().scan(0, |end, list| {
            *end += list.len();
            Some(*end)
        });
        std::iter::once(0).chain(ends)
    }

    fn places(&self) -> impl Iterator<Item = usize> {
        self.0.values().flatten().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch() -> PackedBatch {
        let mut batch = PackedBatch::default();
        batch.push(&[7, 5, 7], 2);
        batch.push(&(0..300).map(|i| i % 10).collect::<Vec<u32>>(), 299);
        batch
    }

    fn field(tables: &Tables, field: Field, n: usize) -> Vec<i32> {
        let start = tables.offset(field) as usize / 4;
        tables.words[start..start + n].to_vec()
    }

    #[test]
    fn tiles_cover_every_token_once_and_begin_with_the_longest() {
        let tables = Tables::new(&batch());
        assert_eq!((tables.tokens, tables.scored), (303, 2));
        assert_eq!((tables.query_tiles, tables.key_tiles), (4, 4));
        let query = field(&tables, Field::QueryTiles, 8);
        assert_eq!(query, [1, 256, 1, 128, 0, 0, 1, 0]);
        let key = field(&tables, Field::KeyTiles, 16);
        assert_eq!(
            key,
            [
                3, 128, 303, 0, 131, 128, 303, 0, 259, 44, 303, 0, 0, 3, 3, 0
            ]
        );
        assert_eq!(
            field(&tables, Field::Sequences, 8),
            [0, 3, 0, 0, 3, 300, 0, 0]
        );
        assert_eq!(field(&tables, Field::Positions, 5), [0, 1, 2, 0, 1]);
    }

    #[test]
    fn scored_tokens_and_what_predicts_them() {
        let tables = Tables::new(&batch());
        assert_eq!(field(&tables, Field::Predictors, 2), [1, 301]);
        assert_eq!(field(&tables, Field::Targets, 2), [7, 9]);
        assert_eq!(field(&tables, Field::Counting, 4), [0, 1, 2, 3]);
    }

    #[test]
    fn places_of_a_token_are_listed_in_order() {
        let mut batch = PackedBatch::default();
        batch.push(&[7, 5, 7, 2, 5, 7], 1);
        let tables = Tables::new(&batch);
        assert_eq!(tables.distinct, 3);
        assert_eq!(field(&tables, Field::Distinct, 3), [2, 5, 7]);
        assert_eq!(field(&tables, Field::DistinctStarts, 4), [0, 1, 3, 6]);
        assert_eq!(field(&tables, Field::DistinctPlaces, 6), [3, 1, 4, 0, 2, 5]);
        for name in [Field::Sequences, Field::KeyTiles, Field::QueryTiles] {
            assert_eq!(tables.offset(name) % 16, 0);
        }
    }

    #[test]
    fn a_shared_prompt_is_seen_to_the_end_of_its_group_and_predicts_once_for_each_member() {
        let mut batch = PackedBatch::default();
        batch.push(&[7, 5, 7], 2);
        let prompt: Vec<u32> = (0..200).collect();
        batch.push_group(&prompt, [&[1, 2][..], &[3], &[4, 5, 6]]);
        let tables = Tables::new(&batch);
        assert_eq!((tables.tokens, tables.scored), (209, 7));
        let sequences = field(&tables, Field::Sequences, 20);
        assert_eq!(sequences[..8], [0, 3, 0, 0, 3, 200, 0, 0]);
        assert_eq!(
            sequences[8..],
            [203, 2, 3, 200, 205, 1, 3, 200, 206, 3, 3, 200]
        );
        assert_eq!(
            field(&tables, Field::Positions, 209)[203..],
            [200, 201, 200, 200, 201, 202]
        );
        let key = field(&tables, Field::KeyTiles, 4 * tables.key_tiles);
        assert_eq!(key[..8], [3, 128, 209, 0, 131, 72, 209, 0]);
        assert!(key.chunks(4).any(|tile| tile == [203, 2, 205, 0]));
        let query = field(&tables, Field::QueryTiles, 2 * tables.query_tiles);
        assert_eq!(query, [2, 0, 3, 0, 4, 0, 1, 128, 0, 0, 1, 0]);
        assert_eq!(
            field(&tables, Field::Predictors, 7),
            [1, 202, 203, 202, 202, 206, 207]
        );
        assert_eq!(field(&tables, Field::Targets, 7), [7, 1, 2, 3, 4, 5, 6]);
        assert_eq!(tables.predicting, 5);
        assert_eq!(
            field(&tables, Field::Predicting, 5),
            [1, 202, 203, 206, 207]
        );
        assert_eq!(
            field(&tables, Field::PredictingStarts, 6),
            [0, 1, 4, 5, 6, 7]
        );
        assert_eq!(
            field(&tables, Field::PredictingRows, 7),
            [0, 1, 3, 4, 2, 5, 6]
        );
    }
}
