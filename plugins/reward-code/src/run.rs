//! Runs programs under limits, and says what became of them.

use crate::nesting::is_too_deep;
use crate::program::Config;
use monty::MontyRun;
use monty_types::{BASELINE_MEMORY, LIVE_MEMORY};
use monty_types::{CompileOptions, ExcType, MontyException, MontyObject, PrintWriter};
use monty_types::{ResourceLimits, ResourceTracker};
use std::sync::atomic::Ordering;
use std::time::Duration;

/// What a program returns that came to its end: `exit` in the middle or an open bracket do not get here.
const END: i64 = 20_517_231_908;
/// Python calls within one another. A frame takes some 1 KiB of the guest's stack.
const MAX_DEPTH: usize = 400;

/// Why a program did not come to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// A syntax error, an exception, an assertion that does not hold.
    Wrong,
    /// Steps or memory ran out.
    Limited,
    /// The interpreter lacks a feature of Python or a module, which is named.
    Unsupported(String),
}

/// What became of a completion's code.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Whether the code comes to its end without any test.
    pub runs: bool,
    pub passed: usize,
    pub tests: usize,
    /// Whether a run took too many steps or too much memory; the tests after it count as failed.
    pub limited: bool,
}

/// Runs `code` alone, then with each test, every time from the beginning.
///
/// # Errors
/// The feature that the interpreter lacks.
pub fn report(config: &Config, code: &str, tests: &[String]) -> Result<Report, String> {
    let mut report = Report {
        tests: tests.len(),
        ..Report::default()
    };
    // The code alone is asked first: one that leaves a bracket open must not swallow a test.
    for test in std::iter::once("").chain(tests.iter().map(String::as_str)) {
        match program(config, &format!("{code}\n{test}\n{END}\n")) {
            Ok(()) if report.runs => report.passed += 1,
            Ok(()) => report.runs = true,
            Err(Failure::Unsupported(what)) => return Err(what),
            Err(Failure::Limited) => {
                report.limited = true;
                break;
            }
            Err(Failure::Wrong) if report.runs => {}
            Err(Failure::Wrong) => break,
        }
    }
    Ok(report)
}

fn program(config: &Config, source: &str) -> Result<(), Failure> {
    // What runs before this have left is not charged to it. Of the allocator's own limit, beyond which it aborts, no use is
    // made: until the interpreter looks, a run may take what the instance has. Natively, where only tests run, nothing
    // counts bytes, and there is no limit of memory.
    BASELINE_MEMORY.store(LIVE_MEMORY.load(Ordering::Relaxed), Ordering::Relaxed);
    let memory = (config.memory_mib as usize) << 20;
    if is_too_deep(source) {
        return Err(Failure::Wrong);
    }
    let limits = ResourceLimits::default()
        .max_duration(budget(config.steps))
        .max_memory(memory)
        .max_recursion_depth(MAX_DEPTH);
    let parsed = MontyRun::new(
        source.to_owned(),
        "answer.py",
        Vec::new(),
        CompileOptions::default(),
    );
    let run = parsed.map_err(|error| failure(&error, true))?;
    let result = run.run(
        Vec::new(),
        ResourceTracker::new(limits),
        PrintWriter::Disabled,
    );
    match result.map_err(|error| failure(&error, false))? {
        MontyObject::Int(END) => Ok(()),
        _ => Err(Failure::Wrong),
    }
}

/// Steps as the interpreter's clock has them: the one in `stubs/web-time` is looked at every 255 instructions.
#[cfg(target_arch = "wasm32")]
fn budget(steps: u64) -> Duration {
    Duration::from_nanos(steps.div_ceil(255))
}

/// Natively, where only tests run, the clock is a real one; a busy machine has to get through what is sound.
#[cfg(not(target_arch = "wasm32"))]
fn budget(steps: u64) -> Duration {
    Duration::from_nanos(steps.saturating_mul(1000))
}

fn failure(error: &MontyException, parsing: bool) -> Failure {
    let message = || error.message().unwrap_or("something").to_owned();
    match error.exc_type() {
        // Code may raise this one itself, but not while it is read.
        ExcType::NotImplementedError if parsing => Failure::Unsupported(message()),
        ExcType::ModuleNotFoundError => Failure::Unsupported(message()),
        ExcType::TimeoutError | ExcType::MemoryError => Failure::Limited,
        _ => Failure::Wrong,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::program::{last_block, tests};
    use serde_json::json;

    fn judged(code: &str, cases: &[&str]) -> Result<Report, String> {
        let cases: Vec<String> = cases.iter().map(|case| (*case).to_owned()).collect();
        report(&Config::default(), code, &cases)
    }

    fn counts(code: &str, cases: &[&str]) -> (bool, usize, bool) {
        let report = judged(code, cases).unwrap();
        (report.runs, report.passed, report.limited)
    }

    #[test]
    fn the_share_that_passes() {
        let double = "def double(x):\n    return 2 * x";
        let cases = [
            "assert double(2) == 4",
            "assert double(-1) == 2",
            "assert double('a') == 'aa'",
        ];
        assert_eq!(counts(double, &cases), (true, 2, false));
        // What models write: modules, classes, loops, comprehensions, exceptions.
        let code = "from collections import Counter\nimport math, re\nclass Pile:\n    def __init__(self):\n        \
            self.items = []\n    def push(self, x):\n        self.items.append(x)\n        return self\n\
            def most(text):\n    best = Counter(re.findall(r'\\w+', text)).most_common(1)\n    while False:\n        pass\n    \
            try:\n        return best[0][0]\n    except IndexError:\n        return None";
        let cases = [
            "assert most('a b b') == 'b'",
            "assert most('') is None",
            "assert Pile().push(1).items == [1]",
            "assert f'{math.pi:.2f}' == '3.14' and 7 // 2 ** 1 == 3 and {*'ab'} == set('ab')",
        ];
        assert_eq!(counts(code, &cases), (true, 4, false));
    }

    #[test]
    fn code_that_is_wrong_is_wrong() {
        let fails = (false, 0, false);
        for code in [
            "def f(:",
            "x = 1 / 0",
            "raise NotImplementedError('later')",
            "x = '''",
            "x = (",
            "f(",
            "x = 1 +\\",
        ] {
            assert_eq!(counts(code, &["assert True"]), fails, "{code}");
        }
        // Leaving early is no way past a test.
        for code in [
            "raise SystemExit",
            "import sys\nsys.exit(0)",
            "exit()",
            "quit()",
        ] {
            assert_eq!(counts(code, &["assert False"]), fails, "{code}");
        }
        let leaves = "def f():\n    raise SystemExit(0)";
        assert_eq!(counts(leaves, &["assert f() == 1"]), (true, 0, false));
        // Nothing outside can be reached.
        assert_eq!(
            counts("open('/etc/passwd').read()", &["assert True"]),
            fails
        );
    }

    #[test]
    fn what_nests_too_deep_is_wrong() {
        let sum = |terms: usize| format!("x = {}", ["1"].repeat(terms).join("+"));
        let check = ["assert x == 100"];
        assert_eq!(counts(&sum(100), &check), (true, 1, false));
        // The interpreter's own refusal, and ours.
        for terms in [1000, 50_000] {
            assert_eq!(counts(&sum(terms), &check), (false, 0, false));
        }
    }

    #[test]
    fn endless_code_is_stopped() {
        assert_eq!(
            counts("while True:\n    pass", &["assert True"]),
            (false, 0, true)
        );
        let endless = "def f(x):\n    while x:\n        pass\n    return x";
        assert_eq!(
            counts(
                endless,
                &["assert f(0) == 0", "assert f(1)", "assert f(0) == 0"]
            ),
            (true, 1, true)
        );
        // It cannot be caught, and an endless recursion ends as in Python.
        let caught = "def f():\n    while True:\n        try:\n            while True:\n                pass\n        except BaseException:\n            pass\nf()";
        assert_eq!(counts(caught, &["assert True"]), (false, 0, true));
        let deep = "def f(n):\n    return f(n + 1)";
        let cases = [
            "assert f(0)",
            "try:\n    f(0)\nexcept RecursionError:\n    pass",
        ];
        assert_eq!(counts(deep, &cases), (true, 1, false));
    }

    #[test]
    fn what_the_interpreter_lacks_is_not_the_codes_fault() {
        for (code, what) in [
            ("def f():\n    yield 1", "yield"),
            ("import heapq", "heapq"),
            ("class A(B):\n    pass", "inheritance"),
        ] {
            let error = judged(code, &["assert True"]).unwrap_err();
            assert!(error.contains(what), "{error}");
        }
    }

    #[test]
    fn the_last_block_counts() {
        let block = |text: &str| last_block(text);
        assert_eq!(block("no code"), None);
        assert_eq!(
            block("```\na\n```\nthen\n```python\nb\n\nc\n```\ndone").unwrap(),
            "b\n\nc"
        );
        assert_eq!(block("cut off:\n```python\nb = 1").unwrap(), "b = 1");
        assert_eq!(
            block("1. so:\n   ```py\n   if x:\n       y\n   ```").unwrap(),
            "if x:\n    y"
        );
        assert_eq!(block("````\n```\n````").unwrap(), "```");
    }

    #[test]
    fn tests_of_three_shapes() {
        let config = Config::default();
        let read =
            |row: serde_json::Value, code: &str| tests(&config, row.as_object().unwrap(), code);
        let pairs = json!({"tests": [
            {"input": [1, "é\"\n", null], "expected": true},
            {"input": {"b": [2.5], "a": {"k": false}}, "expected": {}},
            {"input": "x", "expected": "x"}]});
        assert_eq!(
            read(pairs, "def first(): pass\ndef second (): pass").unwrap(),
            [
                "assert second(1, \"é\\\"\\n\", None) == True",
                "assert second(b=[2.5], a={\"k\": False}) == {}",
                "assert second(\"x\") == \"x\""
            ]
        );
        let text = json!({"tests": "def check(candidate):\n    assert candidate(1) == 2", "entry_point": "inc"});
        let whole = read(text, "").unwrap().remove(0);
        assert_eq!(
            whole,
            "def check(candidate):\n    assert candidate(1) == 2\ncheck(inc)"
        );
        assert_eq!(
            counts("def inc(x):\n    return x + 1", &[&whole]),
            (true, 1, false)
        );
        for (row, why) in [
            (
                json!({"tests": 3}),
                "column `tests` is neither a list nor a text",
            ),
            (json!({"tests": [" "]}), "column `tests` holds no test"),
            (json!({"tests": []}), "column `tests` holds no test"),
            (
                json!({"tests": [1]}),
                "column `tests`: a test is neither a text nor an object",
            ),
            (
                json!({"tests": [{"input": 1}]}),
                "column `tests`: a test wants `input` and `expected`",
            ),
        ] {
            assert_eq!(read(row, "").unwrap_err(), why);
        }
    }
}
