//! Results of formatters and curricula.

use super::role_guests::{formatter_of, planning};
use super::{host, limits, turn};
use grpo_host::plugin::{
    Call, CurriculumPlugin, Fault, FormatterPlugin, Plugin, PluginError, RowText,
};
use grpo_host::types::{Budget, Prompt};
use serde_json::json;

/// Sets one prompt and one parsed completion up, both at 4096, lets `body` change them, and returns them
/// as a list of one. A prompt's body: tag at 0, text or messages at 4 and 8; stop texts at 12 and 16. A
/// parsed completion: tag, pointer and length of the reasoning at 0, of the answer at 12.
fn formatter(body: &str) -> FormatterPlugin {
    let function = |name: &str| {
        format!(
            r#"(func (export "{name}") (param i32 i32) (result i32)
              (i32.store (i32.const 4100) (i32.const 2048))
              (i32.store (i32.const 4104) (i32.const 1))
              (i32.store8 (i32.const 2048) (i32.const 120))
              (i32.store (i32.const 4) (i32.const 4096))
              (i32.store (i32.const 8) (i32.const 1))
              {body} (i32.const 0))"#
        )
    };
    let bytes = formatter_of(&(function("format") + &function("parse")));
    let loaded = host().load("evil", &bytes, &json!({}), &limits()).unwrap();
    match loaded {
        Plugin::Formatter(plugin) => plugin,
        other => panic!("{:?}", other.id()),
    }
}

fn prompt_of(body: &str) -> Result<Prompt, Fault> {
    let row = RowText { id: 7, json: "{}" };
    let fault = |error: PluginError| {
        assert_eq!((error.call, error.row), (Call::Format, Some(7)));
        assert!(error.hint().is_some(), "{error}");
        error.fault
    };
    let mut prompts = formatter(body).format(&[row]).map_err(fault)?;
    Ok(prompts.pop().unwrap())
}

#[test]
fn hostile_28_a_formatter_returns_an_empty_a_huge_or_a_forged_prompt() {
    let _turn = turn();
    let refused = |body: &str, what: &str| {
        let what = what.to_owned();
        assert_eq!(prompt_of(body), Err(Fault::BadResult { what }));
    };
    assert!(prompt_of("").is_ok());
    refused(
        "(i32.store (i32.const 4104) (i32.const 0))",
        "an empty prompt",
    );
    let size = |what, found, limit| Err(Fault::Size { what, found, limit });
    let long = "(i32.store (i32.const 4100) (i32.const 65536))
        (i32.store (i32.const 4104) (i32.const 1048577))";
    let bytes = "bytes of one prompt";
    assert_eq!(prompt_of(long), size(bytes, 1_048_577, 1_048_576));
    // One stop text of a mebibyte beside a prompt of a byte.
    let stop = "(i32.store (i32.const 4108) (i32.const 3000)) (i32.store (i32.const 4112) (i32.const 1))
        (i32.store (i32.const 3000) (i32.const 65536)) (i32.store (i32.const 3004) (i32.const 1048576))";
    assert_eq!(prompt_of(stop), size(bytes, 1_048_577, 1_048_576));
    // A text of 1 GiB lies outside the guest's memory; 40 MiB do not, but nobody copies them.
    let outside = "(i32.store (i32.const 4104) (i32.const 0x40000000))";
    let copied =
        "(drop (memory.grow (i32.const 640))) (i32.store (i32.const 4104) (i32.const 0x2800000))";
    for (body, word) in [(outside, "out of bounds"), (copied, "fuel")] {
        let fault = prompt_of(body).unwrap_err();
        assert!(
            matches!(&fault, Fault::Abi { reason } if reason.contains(word)),
            "{fault}"
        );
    }
    // One message `x` whose role is a clear-screen sequence.
    let role =
        "(i32.store8 (i32.const 4096) (i32.const 1)) (i32.store (i32.const 4100) (i32.const 3000))
        (i32.store (i32.const 3000) (i32.const 3100)) (i32.store (i32.const 3004) (i32.const 4))
        (i32.store (i32.const 3008) (i32.const 2048)) (i32.store (i32.const 3012) (i32.const 1))
        (i32.store (i32.const 3100) (i32.const 0x4a325b1b))";
    refused(role, "a message with the role `\\u{1b}[2J`");
    let parsed = "(i32.store8 (i32.const 4096) (i32.const 1))
        (i32.store (i32.const 4104) (i32.const 1048577))";
    let error = formatter(parsed).parse(&["x"]).unwrap_err();
    let what = "bytes of one parsed completion";
    assert_eq!(Err(error.fault), size(what, 1_048_577, 1_048_576));
}

/// A guest of [`planning`] under the limits of this suite.
fn curriculum(body: &str, prelude: &str) -> CurriculumPlugin {
    let bytes = planning(body, prelude);
    let loaded = host().load("evil", &bytes, &json!({}), &limits()).unwrap();
    match loaded {
        Plugin::Curriculum(plugin) => plugin,
        other => panic!("{:?}", other.id()),
    }
}

const BUDGET: Budget = Budget {
    step: 3,
    rows: 10,
    prompts: 2,
    group_size: 4,
    seed: 0,
};

#[test]
fn hostile_29_a_curriculum_plans_what_there_is_not() {
    let _turn = turn();
    let plan = |body: &str| {
        let planned = curriculum(body, "").plan(&[], &[], &BUDGET);
        planned.map_err(|error| {
            assert_eq!(error.call, Call::Plan);
            assert!(error.hint().is_some(), "{error}");
            error.fault
        })
    };
    let refused = |body: &str, what: &str| {
        let what = what.to_owned();
        assert_eq!(plan(body), Err(Fault::BadResult { what }));
    };
    assert_eq!(plan("").unwrap().picks[0].rollouts, 4);
    let row = |n: i64| format!("(i64.store (i32.const 4096) (i64.const {n}))");
    refused(&row(10), "row 10 of a dataset with 10 rows");
    let last = "row 18446744073709551615 of a dataset with 10 rows";
    refused(&row(-1), last);
    refused(
        "(i32.store (i32.const 4104) (i32.const 0))",
        "no rollouts for row 0",
    );
    refused(
        "(i32.store (i32.const 12) (i32.const 0))",
        "a plan without picks",
    );
    refused("(f64.store (i32.const 16) (f64.const -0.5))", "epoch -0.5");
    for number in ["nan", "inf", "-inf"] {
        let fault = plan(&format!("(f64.store (i32.const 16) (f64.const {number}))"));
        assert!(
            matches!(&fault, Err(Fault::Number { what, .. }) if what == "epoch"),
            "{number}: {fault:?}"
        );
    }
    let size = |what, found, limit| Err(Fault::Size { what, found, limit });
    let most = "(i32.store (i32.const 4104) (i32.const -1))";
    assert_eq!(
        plan(most),
        size("completions in one plan", 4_294_967_295, 64)
    );
    let state = "(drop (memory.grow (i32.const 100))) (i32.store (i32.const 24) (i32.const 0))
        (i32.store (i32.const 28) (i32.const 8388609))";
    assert_eq!(plan(state), size("bytes of state", 8_388_609, 8_388_608));
}

/// A metric whose name is the step: a new series in every plan.
#[test]
fn hostile_19_metrics_with_new_names_at_each_call() {
    let _turn = turn();
    let body = "(i32.store (i32.const 32) (i32.const 3000)) (i32.store (i32.const 36) (i32.const 1))
        (i32.store (i32.const 3000) (i32.const 3100)) (i32.store (i32.const 3004) (i32.const 8))
        (i64.store (i32.const 3100) (i64.or (i64.const 0x4040404040404040)
          (i64.or (i64.and (local.get 4) (i64.const 15))
            (i64.shl (i64.and (local.get 4) (i64.const 0xf0)) (i64.const 4)))))
        (i64.store8 (i32.const 3107) (i64.add (i64.const 97) (i64.shr_u (local.get 4) (i64.const 8))))";
    let plugin = curriculum(body, "");
    let plan = |step| plugin.plan(&[], &[], &Budget { step, ..BUDGET });
    let names: std::collections::BTreeSet<String> = (0..1024_u64)
        .filter_map(|step| Some(plan(step).ok()?.metrics.remove(0).0))
        .collect();
    assert_eq!(names.len(), 256);
    // Known names stay in use.
    assert!(plan(0).is_ok());
}
