//! What the kernels of training are told of a packed batch: positions, tiles of attention, scored tokens, and which tokens
//! share a row of the embedding. Device-free.

use std::collections::BTreeMap;

use crate::types::PackedBatch;

/// Tokens of a tile of attention (train_attention.cu).
pub(super) const TILE: usize = 128;

/// Words that a field starts at a multiple of: whole int4s.
const STEP: usize = 4;

/// A table in the one array that is uploaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Field {
    /// Tokens, `[T]`.
    Ids,
    /// Of each token in its sequence, `[T]`.
    Positions,
    /// `[S, 4]`: first token, tokens, and of a prefix that others share, which there is none of yet, the same.
    Sequences,
    /// `[query tiles, 2]`: sequence, first token within it.
    QueryTiles,
    /// `[key tiles, 4]`: first key, keys, end of the tokens that see them, 0.
    KeyTiles,
    /// Tokens whose hidden state predicts a scored token, `[R]`.
    Predictors,
    /// Scored tokens, `[R]`.
    Targets,
    /// 0, 1, …, `T`.
    Counting,
    /// The distinct tokens of the batch, rising, `[U]`; where the places of each begin, `[U + 1]`; and the places, `[T]`.
    Distinct,
    DistinctStarts,
    DistinctPlaces,
}

const FIELDS: usize = 11;

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
}

impl Tables {
    /// Of a batch that has passed its checks.
    pub(super) fn new(batch: &PackedBatch) -> Self {
        let sequences: Vec<(usize, usize)> = batch
            .cu_seqlens
            .windows(2)
            .map(|w| (w[0], w[1] - w[0]))
            .collect();
        let (query, key) = (query_tiles(&sequences), key_tiles(&sequences));
        let predictors: Vec<usize> = (0..batch.ids.len())
            .filter(|t| batch.scored[*t])
            .map(|t| t - 1)
            .collect();
        let places = places(&batch.ids);
        let ids = |ids: &[u32]| ids.iter().map(|id| *id as i32).collect::<Vec<i32>>();
        let numbers = |list: &mut dyn Iterator<Item = usize>| list.map(|n| n as i32).collect();
        let starts = std::iter::once(0).chain(places.values().scan(0, |end, list| {
            *end += list.len();
            Some(*end)
        }));
        let fields: [Vec<i32>; FIELDS] = [
            ids(&batch.ids),
            numbers(&mut sequences.iter().flat_map(|(_, n)| 0..*n)),
            numbers(&mut sequences.iter().flat_map(|(first, n)| [*first, *n, 0, 0])),
            numbers(&mut query.iter().flatten().copied()),
            numbers(&mut key.iter().flatten().copied()),
            numbers(&mut predictors.iter().copied()),
            numbers(&mut predictors.iter().map(|t| batch.ids[t + 1] as usize)),
            numbers(&mut (0..=batch.ids.len())),
            numbers(&mut places.keys().map(|id| *id as usize)),
            numbers(&mut starts.into_iter()),
            numbers(&mut places.values().flatten().copied()),
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
            distinct: places.len(),
        }
    }

    /// Of a field in `words`, in bytes.
    pub(super) fn offset(&self, field: Field) -> u64 {
        (self.starts[field as usize] * size_of::<i32>()) as u64
    }
}

/// Those that see most first, so that no long one is left for the end.
fn query_tiles(sequences: &[(usize, usize)]) -> Vec<[usize; 2]> {
    let tiles = |(index, (_, n)): (usize, &(usize, usize))| {
        (0..*n).step_by(TILE).map(move |first| [index, first])
    };
    let mut all: Vec<[usize; 2]> = sequences.iter().enumerate().flat_map(tiles).collect();
    all.sort_by_key(|[_, first]| std::cmp::Reverse(*first));
    all
}

/// Those that most see first.
fn key_tiles(sequences: &[(usize, usize)]) -> Vec<[usize; 4]> {
    let tiles = |(start, n): &(usize, usize)| {
        let end = start + n;
        (*start..end)
            .step_by(TILE)
            .map(move |first| [first, TILE.min(end - first), end, 0])
    };
    let mut all: Vec<[usize; 4]> = sequences.iter().flat_map(tiles).collect();
    all.sort_by_key(|[first, _, end, _]| std::cmp::Reverse(end - first));
    all
}

/// The places of each token, rising, so that a gradient is summed in one order.
fn places(ids: &[u32]) -> BTreeMap<u32, Vec<usize>> {
    let mut places = BTreeMap::<u32, Vec<usize>>::new();
    for (place, id) in ids.iter().enumerate() {
        places.entry(*id).or_default().push(place);
    }
    places
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
}
