//! Numbers as exact fractions: reading them out of text and comparing them.
//!
//! Floats are no option: `0.1 + 0.2` style rounding would make a right answer wrong. A number whose
//! fraction does not fit `i128` is no number here.

/// How a text becomes a number.
#[derive(Clone, Copy, Debug)]
pub struct Reading {
    /// `50%` is 1/2; otherwise the sign is ignored and it is 50.
    pub percent: bool,
    /// `1/2` is one number; otherwise it is 1 and 2.
    pub fractions: bool,
}

/// A fraction in lowest terms, denominator positive; equality of fields is equality of numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rational {
    num: i128,
    den: i128,
}

impl Rational {
    fn new(num: i128, den: i128) -> Option<Self> {
        if den == 1 {
            return Some(Self { num, den }); // Most answers; division of 128 bits is slow on wasm.
        }
        let (mut a, mut b) = (num.unsigned_abs(), den.unsigned_abs());
        while b != 0 {
            (a, b) = (b, a % b);
        }
        let gcd = i128::try_from(a).ok()?;
        (den > 0).then(|| Self {
            num: num / gcd,
            den: den / gcd,
        })
    }

    /// `1234`, `1,234.50` or `.5`, without sign. Commas only between groups of three digits.
    fn decimal(text: &str) -> Option<Self> {
        let (whole, frac) = text.split_once('.').unwrap_or((text, ""));
        let mut groups = whole.split(',');
        let first = groups.next()?;
        let grouped = whole.contains(',');
        if grouped && (first.is_empty() || first.len() > 3) {
            return None;
        }
        let mut num: i128 = 0;
        let mut digits = 0_usize;
        let mut push = |part: &str| -> Option<()> {
            for b in part.bytes() {
                let digit = b.is_ascii_digit().then(|| i128::from(b - b'0'))?;
                num = num.checked_mul(10)?.checked_add(digit)?;
                digits += 1;
            }
            Some(())
        };
        push(first)?;
        for group in groups {
            (group.len() == 3).then_some(())?;
            push(group)?;
        }
        push(frac)?;
        let den = 10_i128.checked_pow(u32::try_from(frac.len()).ok()?)?;
        (digits > 0).then_some(())?;
        Self::new(num, den)
    }
}

/// The last number of `text`.
pub fn last(text: &str, reading: Reading) -> Option<Rational> {
    let bytes = text.as_bytes();
    let end = bytes.iter().rposition(u8::is_ascii_digit)? + 1;
    let run = |b: &u8| b.is_ascii_digit() || matches!(b, b'.' | b',' | b'/');
    let start = bytes[..end]
        .iter()
        .rposition(|b| !run(b))
        .map_or(0, |i| i + 1);
    let token = text[start..end].trim_start_matches([',', '/']);
    let (token, value) = unsigned(token, reading)?;
    let negative = is_negative(&text[..end - token.len()]);
    let percent = reading.percent && text[end..].trim_start().starts_with('%');
    let den = value.den.checked_mul(if percent { 100 } else { 1 })?;
    Rational::new(if negative { -value.num } else { value.num }, den)
}

/// The number that is all of `text`, apart from blanks, a currency sign before and a full stop after.
pub fn whole(text: &str, reading: Reading) -> Option<Rational> {
    let text = text.trim().trim_end_matches('.');
    let body = text.trim_start_matches(['+', '-', '−', '$', '€', '£', ' ']);
    let body = body.trim_end_matches(['%', ' ']);
    let clean = body.starts_with(|c: char| c.is_ascii_digit() || c == '.')
        && body
            .bytes()
            .all(|b| b.is_ascii_digit() || matches!(b, b'.' | b',' | b'/'))
        && (reading.fractions || !body.contains('/'));
    if !clean || unsigned(body, reading)?.0.len() != body.len() {
        return None;
    }
    last(text, reading)
}

/// Reads a run of digits, points, commas and slashes: all of it if that makes sense, else what
/// follows the last separator. Returns what was read beside its value.
fn unsigned(token: &str, reading: Reading) -> Option<(&str, Rational)> {
    if let Some((a, b)) = token.split_once('/').filter(|_| reading.fractions)
        && let (Some(a), Some(b)) = (Rational::decimal(a), Rational::decimal(b))
    {
        // A division by zero is no number, and not the number zero either.
        let num = a.num.checked_mul(b.den)?;
        return Some((token, Rational::new(num, a.den.checked_mul(b.num)?)?));
    }
    for separators in ["/", "/,", "/,."] {
        let tail = token.rsplit(|c| separators.contains(c)).next()?;
        if let Some(value) = Rational::decimal(tail) {
            return Some((tail, value));
        }
    }
    None
}

/// Whether the text before a number ends in a minus sign that is not a subtraction (`5-3`).
fn is_negative(before: &str) -> bool {
    let before = before.trim_end_matches(['$', '€', '£']);
    let Some(rest) = before.strip_suffix(['-', '−']) else {
        return false;
    };
    !rest.ends_with(|c: char| c.is_alphanumeric() || c == ')' || c == '-')
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Reading = Reading {
        percent: true,
        fractions: true,
    };

    fn q(num: i128, den: i128) -> Option<Rational> {
        Rational::new(num, den)
    }

    #[test]
    fn reads_the_last_number() {
        for (text, expected) in [
            ("so 1/2", q(1, 2)),
            ("= 0.5", q(1, 2)),
            ("about 50%.", q(1, 2)),
            ("$1,234.50 in all.", q(2469, 2)),
            ("first 3, then 4", q(4, 1)),
            ("3,4", q(4, 1)),
            ("5-3", q(3, 1)),
            ("x = -3", q(-3, 1)),
            ("-$20", q(-20, 1)),
            ("− .25", q(1, 4)),
            ("−.25", q(-1, 4)),
            ("version 1.2.3", q(3, 1)),
            ("1/0", None),
            ("none", None),
            ("1/2/4", q(4, 1)),
        ] {
            assert_eq!(last(text, ALL), expected, "{text}");
        }
    }

    #[test]
    fn readings_can_be_switched_off() {
        let plain = Reading {
            percent: false,
            fractions: false,
        };
        assert_eq!(last("50%", plain), q(50, 1));
        assert_eq!(last("1/2", plain), q(2, 1));
        assert_eq!(whole("1/2", plain), None);
    }

    #[test]
    fn whole_wants_nothing_else() {
        assert_eq!(whole(" $1,000. ", ALL), q(1000, 1));
        assert_eq!(whole("-50 %", ALL), q(-1, 2));
        assert_eq!(whole("12 apples", ALL), None);
        assert_eq!(whole("3,4", ALL), None);
        assert_eq!(
            whole("99999999999999999999999999999999999999999", ALL),
            None
        );
    }
}
