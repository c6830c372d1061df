//! How deep source nests, before anything is parsed.
//!
//! The interpreter takes 200 levels, but counts them in a tree that is there already, and the tree of `1+1+1+…` or `a.b.b…`
//! is as deep as the chain is long: dropping it takes more stack than the component has. The parser guards what it recurses
//! for itself; chains it reads in a loop.

use ruff_python_ast::token::TokenKind;
use ruff_python_parser::{Mode, lexer::lex};

/// Levels that are parsed. What is measured is at least the depth, and mostly a few times that, so that it has to be well
/// above the interpreter's own limit. A tree of 3000 levels can still be dropped, one of 10 000 cannot.
const MAX_LEVELS: usize = 2000;

/// What is open: a bracket, or the statement itself.
#[derive(Clone, Copy, Default)]
struct Level {
    /// Of the expression that is being read.
    depth: usize,
    /// The deepest of those before it.
    deepest: usize,
}

impl Level {
    fn next(&mut self) {
        self.deepest = self.deepest.max(self.depth);
        self.depth = 0;
    }
}

/// Whether the source nests deeper than can be parsed here; [`run::program`](crate::run) then need not try.
pub fn is_too_deep(source: &str) -> bool {
    let mut lexer = lex(source, Mode::Module);
    let mut open = Vec::new();
    let mut level = Level::default();
    loop {
        match lexer.next_token() {
            TokenKind::EndOfFile => return false,
            TokenKind::Lpar | TokenKind::Lsqb | TokenKind::Lbrace => {
                open.push(std::mem::take(&mut level));
            }
            // As the operand of what comes after it, it is one level deeper than what it holds.
            TokenKind::Rpar | TokenKind::Rsqb | TokenKind::Rbrace => {
                level.next();
                let inner = level.deepest;
                level = open.pop().unwrap_or_default();
                level.depth = level.depth.max(inner) + 1;
            }
            TokenKind::Comma | TokenKind::Colon => level.next(),
            TokenKind::Newline | TokenKind::Semi if open.is_empty() => level = Level::default(),
            TokenKind::Dot => level.depth += 1,
            kind if kind.is_arithmetic() || kind.is_bitwise_or_shift() => level.depth += 1,
            _ => {}
        }
        if level.depth + open.len() > MAX_LEVELS {
            return true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_chains_are_too_deep() {
        let n = 50_000;
        for source in [
            format!("x = {}", ["1"].repeat(n).join("+")),
            format!("x = a{}", ".b".repeat(n)),
            format!("x = f{}", "()".repeat(n)),
            format!("x = a{}", "[0]".repeat(n)),
            format!("x = 'a'{}", ".strip()".repeat(n)),
            format!("x = f'{{a{}}}'", ".b".repeat(n)),
            // Each as the first operand of the one around it.
            format!(
                "x = {}1{}",
                "(".repeat(50),
                format!("{})", "+1".repeat(100)).repeat(50)
            ),
            format!("{}{}", "(".repeat(n), ")".repeat(n)),
        ] {
            assert!(is_too_deep(&source), "{}", &source[..20]);
        }
    }

    #[test]
    fn long_code_is_not() {
        let n = 50_000;
        for source in [
            format!("x = [{}]", "-1 + 2, ".repeat(n)),
            format!("x = {{{}}}", "1: a.b, ".repeat(n)),
            "x = a.b(1) + 2\n".repeat(n),
            "x = 1; ".repeat(n),
            format!("x = '{}'", "1+".repeat(n)),
            format!("x = 1 # {}", ".b".repeat(n)),
            format!("f({})", "g(1), ".repeat(n)),
            format!("x = {}", ["a.b(c)[d]"].repeat(200).join(" + ")),
            "x = )))) +".to_owned(),
            "x = '''".to_owned(),
        ] {
            assert!(!is_too_deep(&source), "{}", &source[..10]);
        }
    }
}
