//! Guests that want more than there is: memories, tables, results, handles. Where a case is about
//! memory, the peak of the whole process is measured.

use super::guest::{self, Parts};
use super::{
    error_of_load, fault_of_score, fault_of_score_within, host, limits, load, samples, totals, turn,
};
use grpo_host::plugin::{Call, Fault, Limits};

const MIB: usize = 1 << 20;

/// `VmRSS` or `VmHWM` of this process, in bytes.
pub(crate) fn resident(key: &str) -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(key)).unwrap();
    let kib = line.split_whitespace().nth(1).unwrap();
    kib.parse::<usize>().unwrap() << 10
}

/// Runs `f` and says by how many bytes the process grew at its largest.
fn peak<T>(f: impl FnOnce() -> T) -> (T, usize) {
    // Sets the high-water mark back to what is resident now (proc_pid_clear_refs(5)).
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    let before = resident("VmRSS");
    let value = f();
    (value, resident("VmHWM").saturating_sub(before))
}

#[test]
fn hostile_05_memory_bomb() {
    let _turn = turn();
    // Writes to every page, or none of them would be resident.
    let body = "(loop $again
        (if (i32.eq (memory.grow (i32.const 16)) (i32.const -1)) (then (unreachable)))
        (memory.fill (i32.sub (i32.shl (memory.size) (i32.const 16)) (i32.const 0x100000))
          (i32.const 1) (i32.const 0x100000))
        (br $again)) (unreachable)";
    for memory_mib in [5, 64] {
        let small = Limits {
            memory_mib,
            deadline_ms: 5000,
            ..limits()
        };
        let limit = memory_mib as usize * MIB;
        let wanted = limit + MIB;
        let (fault, grown) = peak(|| fault_of_score_within(&guest::scoring(body), &small));
        assert_eq!(fault, Fault::Memory { wanted, limit });
        assert!(grown < limit + 32 * MIB, "{grown} bytes");
        assert!(
            memory_mib < 64 || grown > limit / 2,
            "{grown} bytes: not measured"
        );
    }
    let limit = 256 * MIB;
    let wanted = limit + MIB;
    let patient = Limits {
        deadline_ms: 5000,
        ..limits()
    };
    let fault = fault_of_score_within(&guest::scoring(body), &patient);
    assert_eq!(fault, Fault::Memory { wanted, limit });
}

#[test]
fn hostile_06_many_memories() {
    let _turn = turn();
    // 500 of 1 MiB, in five instances: a module may not have more than 100.
    let hundred = "(memory 16)".repeat(100);
    let five = "(core instance (instantiate $m))".repeat(5);
    let text = format!("(component (core module $m {hundred}) {five})");
    let error = error_of_load(&wat::parse_str(text).unwrap());
    let what = "memories";
    let declares = Fault::Declares {
        what,
        found: 500,
        limit: 8,
    };
    assert_eq!((error.call, error.fault), (Call::Load, declares));
    // Few enough to declare, each far below the cap, too much together: 4 + 7 · 40 MiB.
    let main = "(memory 640)".repeat(7) + &guest::score("(unreachable)");
    let error = error_of_load(&guest::component(&main));
    let (wanted, limit) = (284 * MIB, 256 * MIB);
    assert_eq!(
        (error.call, error.fault),
        (Call::Instantiate, Fault::Memory { wanted, limit })
    );
}

#[test]
fn hostile_07_one_huge_memory() {
    let _turn = turn();
    let score = guest::score("(unreachable)");
    let bytes = guest::component(&format!("(memory 65536) {score}"));
    let (error, grown) = peak(|| error_of_load(&bytes));
    assert_eq!(error.call, Call::Instantiate);
    assert!(
        matches!(
            error.fault,
            Fault::Memory {
                limit: 268_435_456,
                ..
            }
        ),
        "{error}"
    );
    assert_eq!(error.hint().unwrap(), "raise limits.memory_mib of `evil`");
    assert!(grown < 64 * MIB, "{grown} bytes");
    let error = error_of_load(&guest::component(&format!("(memory i64 1) {score}")));
    assert!(
        matches!(&error.fault, Fault::Compile { reason } if reason.contains("memory64")),
        "{error}"
    );
}

#[test]
fn hostile_08_tables() {
    let _turn = turn();
    let grow = "(loop $again
            (if (i32.eq (table.grow $t (ref.null func) (i32.const 1000)) (i32.const -1))
              (then (unreachable)))
            (br $again)) (unreachable)";
    let main = format!("(table $t 1 funcref) {}", guest::score(grow));
    let (wanted, limit) = (100_001, 100_000);
    assert_eq!(
        fault_of_score(&guest::component(&main)),
        Fault::Table { wanted, limit }
    );
    // Declared: one of a million elements, and ten that are too much together.
    let score = guest::score("(unreachable)");
    let error = error_of_load(&guest::component(&format!(
        "(table 1000000 funcref) {score}"
    )));
    assert!(
        matches!(&error.fault, Fault::Compile { reason } if reason.contains("table")),
        "{error}"
    );
    let ten = "(table 20000 funcref)".repeat(10);
    let error = error_of_load(&guest::component(&format!("{ten} {score}")));
    let wanted = 120_000;
    assert_eq!(
        (error.call, error.fault),
        (Call::Instantiate, Fault::Table { wanted, limit })
    );
    let many = "(table 1 funcref)".repeat(33);
    let error = error_of_load(&guest::component(&format!("{many} {score}")));
    let declares = Fault::Declares {
        what: "tables",
        found: 33,
        limit: 32,
    };
    assert_eq!((error.call, error.fault), (Call::Load, declares));
}

/// As many verdicts as fit: a million is a wrong length, four million are more than may be handed over.
#[test]
fn hostile_09_huge_results() {
    let _turn = turn();
    let list = |n: usize| {
        let body = format!(
            "(drop (memory.grow (i32.const 1600))) (i32.store8 (i32.const 0) (i32.const 0))
             (i32.store offset=4 (i32.const 0) (i32.const 131072))
             (i32.store offset=8 (i32.const 0) (i32.const {n})) (i32.const 0)"
        );
        guest::scoring(&body)
    };
    let patient = Limits {
        deadline_ms: 5000,
        ..limits()
    };
    let scored = |n| peak(|| fault_of_score_within(&list(n), &patient));
    let (fault, grown) = scored(400_000);
    let (expected, found) = (1, 400_000);
    assert_eq!(fault, Fault::Length { expected, found });
    assert!(grown < 192 * MIB, "{grown} bytes");
    let (fault, grown) = scored(4_000_000);
    assert!(
        matches!(&fault, Fault::Abi { reason } if reason.contains("fuel")),
        "{fault}"
    );
    assert!(grown < 192 * MIB, "{grown} bytes");
}

/// 40 000 skips whose reasons are all the same 3 MiB of memory: 120 GB for the host to copy.
#[test]
fn hostile_10_amplified_result() {
    let _turn = turn();
    let body = "(loop $next
          (local.set $at (i32.add (i32.const 65536) (i32.mul (local.get $i) (i32.const 24))))
          (i32.store8 (local.get $at) (i32.const 1))
          (i32.store offset=8 (local.get $at) (i32.const 1100000))
          (i32.store offset=12 (local.get $at) (i32.const 3000000))
          (local.set $i (i32.add (local.get $i) (i32.const 1)))
          (br_if $next (i32.lt_u (local.get $i) (i32.const 40000))))
        (i32.store8 (i32.const 0) (i32.const 0))
        (i32.store offset=4 (i32.const 0) (i32.const 65536))
        (i32.store offset=8 (i32.const 0) (i32.const 40000))
        (i32.const 0)";
    let (fault, grown) = peak(|| fault_of_score(&guest::scoring(body)));
    assert!(
        matches!(&fault, Fault::Abi { reason } if reason.contains("fuel")),
        "{fault}"
    );
    assert!(grown < 128 * MIB, "{grown} bytes");
}

#[test]
fn hostile_15_handles() {
    let _turn = turn();
    let guest = |body: &str| {
        let main = guest::score(body);
        let parts = Parts {
            around: r#"(type $r (resource (rep i32))) (type $s (resource (rep i32)))
              (core func $new (canon resource.new $r)) (core func $drop (canon resource.drop $r))
              (core func $rep (canon resource.rep $r)) (core func $foreign (canon resource.drop $s))"#,
            inner: r#"(import "r" "new" (func $new (param i32) (result i32)))
              (import "r" "drop" (func $drop (param i32)))
              (import "r" "rep" (func $rep (param i32) (result i32)))
              (import "r" "foreign" (func $foreign (param i32)))"#,
            with: r#"(with "r" (instance (export "new" (func $new)) (export "drop" (func $drop))
              (export "rep" (func $rep)) (export "foreign" (func $foreign))))"#,
            main: &main,
            ..Parts::default()
        };
        parts.build()
    };
    let million = "(loop $next
        (drop (call $new (local.get $i)))
        (local.set $i (i32.add (local.get $i) (i32.const 1)))
        (br_if $next (i32.lt_u (local.get $i) (i32.const 1000000)))) (call $ones (local.get $n))";
    for (body, word) in [
        (
            "(drop (call $rep (i32.const 12345))) (unreachable)",
            "handle",
        ),
        ("(call $drop (i32.const 1)) (unreachable)", "handle"),
        (
            "(local.set $i (call $new (i32.const 1))) (call $drop (local.get $i))
             (call $drop (local.get $i)) (unreachable)",
            "handle",
        ),
        (
            "(call $foreign (call $new (i32.const 1))) (unreachable)",
            "handle",
        ),
        (million, "handle"),
    ] {
        let (fault, grown) = peak(|| fault_of_score(&guest(body)));
        let reason = match &fault {
            Fault::Abi { reason } | Fault::Trap { reason } => reason,
            other => panic!("{other}"),
        };
        assert!(reason.contains(word), "{body}: {reason}");
        assert!(grown < 64 * MIB, "{grown} bytes");
    }
    // Fewer than the cap at a time, and given back: as many as one likes.
    let returned = "(loop $next
        (call $drop (call $new (local.get $i)))
        (local.set $i (i32.add (local.get $i) (i32.const 1)))
        (br_if $next (i32.lt_u (local.get $i) (i32.const 10000)))) (call $ones (local.get $n))";
    let host = host();
    let plugin = load(&host, &guest(returned), &Limits::default()).unwrap();
    let scoring = plugin.score(&samples(&["a"])).unwrap();
    assert_eq!(totals(&scoring.scores), [Some(1.0)]);
}

/// 100 000 requests, one in ten of them failing, leave the process as large as 5 000 did.
#[test]
fn a_soak_leaves_memory_flat() {
    let _turn = turn();
    let host = host();
    let plugin = load(&host, &super::policy::picky(), &limits()).unwrap();
    let (good, bad) = (samples(&["a"]), samples(&["trp"]));
    let requests = |n: usize| {
        let mut skipped = 0;
        for i in 0..n {
            let scoring = plugin
                .score(if i % 10 == 9 { &bad } else { &good })
                .unwrap();
            skipped += scoring.faults.len();
        }
        assert_eq!(skipped, n / 10);
    };
    requests(5_000);
    let before = resident("VmRSS");
    requests(100_000);
    let grown = resident("VmRSS").saturating_sub(before);
    assert!(grown < 4 * MIB, "{grown} bytes");
}
