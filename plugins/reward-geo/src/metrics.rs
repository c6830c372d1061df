//! How visible each source is in an answer that cites them as `[1]`, `[2]`, …
//!
//! The measures of Aggarwal et al. 2023, "GEO: Generative Engine Optimization": the share of words of the sentences
//! that cite a source, and the same with each sentence weighted by `exp(-position/|sentences|)`.

/// Shares of one source in an answer; each measure adds up to 1 over all sources, or to 0 if nothing is cited.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Visibility {
    /// Words of the sentences that cite it.
    pub word: f64,
    /// Weights of the positions of those sentences.
    pub position: f64,
    /// Words times weights: "position-adjusted word count".
    pub adjusted: f64,
}

/// The shares of `sources` sources in `answer`. A sentence that cites several is divided among them.
pub fn visibility(answer: &str, sources: usize) -> Vec<Visibility> {
    let sentences = sentences(answer);
    let mut shares = vec![Visibility::default(); sources];
    for (i, sentence) in sentences.iter().enumerate() {
        let cited = citations(sentence, sources);
        let words = words(sentence) as f64 / cited.len().max(1) as f64;
        let weight = (-(i as f64) / sentences.len() as f64).exp();
        for source in &cited {
            let share = &mut shares[source - 1];
            share.word += words;
            share.position += weight / cited.len() as f64;
            share.adjusted += words * weight;
        }
    }
    let fields: [fn(&mut Visibility) -> &mut f64; 3] =
        [|v| &mut v.word, |v| &mut v.position, |v| &mut v.adjusted];
    for field in fields {
        let sum: f64 = shares.iter_mut().map(|share| *field(share)).sum();
        if sum > 0.0 {
            shares.iter_mut().for_each(|share| *field(share) /= sum);
        }
    }
    shares
}

/// Sentences end at `.`, `!` or `?` before a blank, and at line ends; citations behind the mark belong to them.
fn sentences(text: &str) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    for line in text.lines() {
        let (mut sentence, mut ended) = (String::new(), false);
        for word in line.split_whitespace() {
            if ended && !word.starts_with('[') {
                found.push(std::mem::take(&mut sentence));
            }
            sentence.push_str(word);
            sentence.push(' ');
            // `12.[3]` and `this [1].` end as well.
            let plain = without_citations(word);
            ended = plain.ends_with(['.', '!', '?']) || (ended && plain.is_empty());
        }
        found.push(sentence);
    }
    found.retain(|sentence| words(sentence) > 0);
    found
}

fn words(sentence: &str) -> usize {
    let plain = without_citations(sentence);
    let words = plain.split_whitespace();
    words
        .filter(|word| word.chars().any(char::is_alphanumeric))
        .count()
}

/// Text less `[1]`, `[2, 3]` and the like.
fn without_citations(text: &str) -> String {
    let number = |c: char| c.is_ascii_digit() || matches!(c, ',' | ' ');
    let (mut plain, mut rest) = (String::new(), text);
    while let Some((before, inside)) = rest.split_once('[') {
        plain.push_str(before);
        rest = match inside.split_once(']') {
            Some((numbers, after)) if numbers.chars().all(number) => after,
            _ => inside,
        };
    }
    plain + rest
}

/// The sources that a sentence cites, `[1]` or `[1, 2]`, each once.
fn citations(sentence: &str, sources: usize) -> Vec<usize> {
    let inside = sentence
        .split('[')
        .skip(1)
        .filter_map(|part| part.split_once(']'));
    let numbers = inside.flat_map(|(numbers, _)| numbers.split(','));
    let numbers = numbers.filter_map(|number| number.trim().parse().ok());
    let mut cited: Vec<usize> = numbers.filter(|n| (1..=sources).contains(n)).collect();
    cited.sort_unstable();
    cited.dedup();
    cited
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(found: f64, expected: f64) {
        assert!((found - expected).abs() < 1e-12, "{found}, not {expected}");
    }

    /// Three sentences of 4, 2 and 3 words, by hand.
    #[test]
    fn shares_are_those_of_the_paper() {
        let answer = "Water boils at 100 °C. [1] Salt helps. [2] It costs little [1][2].";
        let shares = visibility(answer, 3);
        // 100 and °C are words: 5, 2 and 3 of them.
        let e = |i: f64| (-i / 3.0).exp();
        let word = [5.0 + 1.5, 2.0 + 1.5];
        let position = [1.0 + e(2.0) / 2.0, e(1.0) + e(2.0) / 2.0];
        let adjusted = [5.0 + 1.5 * e(2.0), 2.0 * e(1.0) + 1.5 * e(2.0)];
        for i in [0, 1] {
            close(shares[i].word, word[i] / (word[0] + word[1]));
            close(
                shares[i].position,
                position[i] / (position[0] + position[1]),
            );
            close(
                shares[i].adjusted,
                adjusted[i] / (adjusted[0] + adjusted[1]),
            );
        }
        assert_eq!(shares[2], Visibility::default());
    }

    #[test]
    fn what_is_no_citation_counts_nothing() {
        for answer in [
            "",
            "[1]",
            "No source at all.",
            "Out of range [4] and [0] and [x] and [1.5].",
        ] {
            assert_eq!(
                visibility(answer, 3),
                [Visibility::default(); 3],
                "{answer}"
            );
        }
        // One source alone has all of it.
        let all = Visibility {
            word: 1.0,
            position: 1.0,
            adjusted: 1.0,
        };
        assert_eq!(visibility("Yes [2, 2]. No.", 2)[1], all);
    }

    #[test]
    fn sentences_end_where_people_end_them() {
        let count = |text: &str| sentences(text).len();
        assert_eq!(count("One. Two! Three? [1] [2] Four"), 4);
        assert_eq!(count("3.5 percent of v1.2 is one"), 1);
        assert_eq!(count("- a point\n- another\n\nend"), 3);
        assert_eq!(count("It is 12.[3] Next."), 2);
        assert_eq!(count("Like this [1]. And that [2, 3]! [4] End"), 3);
    }
}
