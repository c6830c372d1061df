//! Drafts that are damaged, replaced, too short, lost or not used: what a run says, and that it goes on.

use std::path::Path;

use super::lab::{Ended, Lab};

const ROLLOUT: &str =
    "rollout --config run.yaml --raw --prompt abcabcab -n 3 --max-tokens 30 --json";
const TRAIN: &str = "train --config run.yaml --set save_steps=1 --draft-tokens 2";

/// A copy of a model of the fixtures or examples, in the lab.
fn copy(lab: &Lab, from: &Path, to: &str) {
    std::fs::create_dir(lab.path(to)).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            std::fs::copy(&path, lab.path(to).join(path.file_name().unwrap())).unwrap();
        }
    }
}

/// Makes every number of an f32 safetensors file this one.
fn fill(lab: &Lab, name: &str, number: f32) {
    let mut bytes = std::fs::read(lab.path(name)).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    for word in bytes[8 + header..].chunks_exact_mut(4) {
        word.copy_from_slice(&number.to_le_bytes());
    }
    std::fs::write(lab.path(name), bytes).unwrap();
}

fn example(name: &str) -> String {
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/arith");
    examples.join(name).display().to_string()
}

fn times(ended: &Ended, text: &str) -> usize {
    ended.stderr.matches(text).count()
}

fn tokens(ended: &Ended) -> Vec<serde_json::Value> {
    let completions = &ended.json()["completions"];
    (0..3).map(|i| completions[i]["tokens"].clone()).collect()
}

#[test]
fn drafting_ends_with_the_drafts_context() {
    let lab = Lab::new();
    copy(&lab, &lab.model(), "short");
    let config = std::fs::read_to_string(lab.path("short/config.json")).unwrap();
    let shorter = config.replace(
        "\"max_position_embeddings\": 256",
        "\"max_position_embeddings\": 32",
    );
    assert_ne!(shorter, config);
    lab.write("short/config.json", shorter);
    for prompt in ["abcabcab", "abcabcababcabcababcabcababcabcababcabcab"] {
        let args = ROLLOUT.replace("abcabcab", prompt) + " --temperature 0 --draft-tokens 3";
        let plain = lab.run(&format!("{args} --draft none")).fine();
        let drafted = lab.run(&format!("{args} --draft model:./short")).fine();
        assert_eq!(tokens(&drafted), tokens(&plain));
        assert_eq!(times(&drafted, "drafting ends at 32 tokens"), 1);
        let guessed = drafted.json()["completions"][0]["telemetry"]["draft_tokens"].clone();
        let reached = prompt.len() < 32;
        assert_eq!(guessed.as_u64().unwrap() > 0, reached, "{guessed}");
    }
    // Distilled on as much of a completion as it can see.
    let ended = lab
        .run(&format!("{TRAIN} --draft model:./short --out a"))
        .fine();
    assert_eq!(times(&ended, "drafting ends at 32 tokens"), 1);
    assert!(lab.metrics("a")[6].contains_key("draft/loss"));
}

#[test]
fn a_damaged_draft_is_left_and_nothing_else_changes() {
    let lab = Lab::new();
    copy(&lab, &lab.model(), "nan");
    fill(&lab, "nan/model.safetensors", f32::NAN);
    copy(&lab, &lab.model(), "headed");
    std::fs::create_dir(lab.path("headed/draft_head")).unwrap();
    let train = format!("{TRAIN} --model ./headed --draft layers:1");
    lab.run(&format!("{train} --steps 1 --out h --quiet"))
        .fine();
    let head = "draft_head/layers-1.safetensors";
    std::fs::copy(
        lab.path(&format!("h/model/{head}")),
        lab.path(&format!("headed/{head}")),
    )
    .unwrap();
    fill(&lab, &format!("headed/{head}"), f32::NAN);
    let warning = |draft: &str| {
        format!(
            "warning: draft `{draft}`: the draft's logits are not finite; going on without it\n\
             hint: lower draft_learning_rate, or check the draft's file\n"
        )
    };
    let plain = lab.run(&format!("{ROLLOUT} --draft none")).fine();
    for draft in ["model:./nan", "layers:1"] {
        let args = format!("{ROLLOUT} --model ./headed --draft {draft} --draft-tokens 2");
        let ended = lab.run(&args).fine();
        assert_eq!(tokens(&ended), tokens(&plain), "{draft}");
        assert_eq!(times(&ended, &warning(draft)), 1, "{ended:?}");
    }
    lab.run(&format!("{TRAIN} --out plain --quiet")).fine();
    let start = |out: &str| format!("{TRAIN} --draft model:./nan --out {out}");
    let ended = lab.run(&start("a")).fine();
    assert_eq!(times(&ended, &warning("model:./nan")), 1, "{ended:?}");
    assert_eq!(lab.metrics("a"), lab.metrics("plain"));
    assert_eq!(lab.completions("a"), lab.completions("plain"));
    assert!(!lab.path("a/draft").exists(), "it is nothing to go on with");
    let mut child = lab.run_until(3, "b", &start("b"));
    child.kill().unwrap();
    child.wait().unwrap();
    lab.run("train --resume b").fine();
    assert_eq!(lab.metrics("b"), lab.metrics("a"));
    assert_eq!(lab.completions("b"), lab.completions("a"));
}

#[test]
fn a_lesson_that_is_not_finite_is_the_drafts_fault() {
    let lab = Lab::new();
    copy(&lab, &lab.model(), "nan");
    fill(&lab, "nan/model.safetensors", f32::NAN);
    // Of two tokens none is drafted, so the gradient is the first to show it.
    let short = "--set max_completion_length=2";
    let train = format!("{TRAIN} {short} --draft model:./nan --out a");
    let ended = lab.run(&train).fine();
    let warning = "warning: draft `model:./nan`: the draft's gradient is not finite; going on";
    assert_eq!(times(&ended, warning), 1, "{ended:?}");
    assert_eq!(times(&ended, "hint: lower draft_learning_rate"), 1);
    assert!(!lab.metrics("a")[1].contains_key("draft/loss"));
    let ended = lab.run(&format!("{TRAIN} --set draft_learning_rate=2 --out b"));
    let (error, _) = ended.refused(2);
    assert_eq!(error, "--set: `draft_learning_rate` is 2; allowed: 0 to 1");
}

#[test]
fn a_resumed_run_wants_the_draft_it_began_with() {
    let lab = Lab::new();
    copy(&lab, &lab.model(), "d");
    for rate in ["0", "1e-3"] {
        let out = format!("a{rate}");
        let flags = format!("--steps 2 --set draft_learning_rate={rate} --quiet");
        lab.run(&format!("{TRAIN} --draft model:./d {flags} --out {out}"))
            .fine();
        let before = lab.metrics(&out);
        let weights = std::fs::read(lab.path("d/model.safetensors")).unwrap();
        fill(&lab, "d/model.safetensors", 0.5);
        let resume = format!("train --resume {out} --steps 4 --quiet");
        let ended = lab.run(&resume);
        let (error, hint) = ended.refused(1);
        assert!(
            error.starts_with("draft `model:./d` has changed since the run began: it is sha256:"),
            "{error}"
        );
        assert!(hint.contains("draft.lock"), "{hint}");
        assert_eq!(lab.metrics(&out), before);
        lab.write("d/model.safetensors", weights);
        lab.run(&resume).fine();
        assert_eq!(lab.metrics(&out).len(), 5);
    }
}

#[test]
fn a_trained_head_is_handed_on() {
    let lab = Lab::new();
    let train = |model: &str, flags: &str| {
        let flags = format!("--steps 2 --draft layers:1 {flags}");
        lab.run(&format!("{TRAIN} --model {model} {flags}")).fine()
    };
    let fixture = lab.model().display().to_string();
    let head =
        |folder: &str| std::fs::read(lab.path(folder).join("draft_head/layers-1.safetensors"));
    let ended = train(&fixture, "--set draft_learning_rate=0.003 --out a");
    let learns = "\nthe head of layers:1 is untrained; it learns with draft_learning_rate 0.003\n";
    assert_eq!(times(&ended, learns.trim_start()), 1, "{ended:?}");
    assert_eq!(times(&ended, "warning"), 0, "{ended:?}");
    let trained = head("a/model").unwrap();
    assert_eq!(head("a/checkpoints/step-2/model").unwrap(), trained);

    // Left alone it is still there, and nothing is said of it.
    let ended = train("a/model", "--set draft_learning_rate=0 --out b");
    assert_eq!(times(&ended, "untrained"), 0, "{ended:?}");
    assert_eq!(head("b/model").unwrap(), trained);
    let ended = lab
        .run(&format!(
            "{ROLLOUT} --model a/checkpoints/step-2/model --draft layers:1"
        ))
        .fine();
    assert_eq!(times(&ended, "untrained"), 0, "{ended:?}");
    // As is that of a resumed run.
    let ended = lab.run("train --resume a --steps 3").fine();
    assert_eq!(times(&ended, "untrained"), 0, "{ended:?}");

    let ended = lab.run(&format!("{ROLLOUT} --draft layers:1")).fine();
    let stays = "warning: the head of layers:1 is untrained; a run with a draft_learning_rate above 0 trains it";
    assert_eq!(times(&ended, stays), 1, "{ended:?}");
    let ended = train(&fixture, "--set draft_learning_rate=0 --out c");
    assert_eq!(times(&ended, stays), 1, "{ended:?}");
    assert!(head("c/model").is_err(), "an untrained head is nothing");
}

#[test]
fn heads_for_other_layers_are_named() {
    let lab = Lab::new();
    copy(&lab, Path::new(&example("model")), "arith");
    std::fs::create_dir(lab.path("arith/draft_head")).unwrap();
    lab.write("arith/draft_head/layers-2.safetensors", "of no matter here");
    let rollout = "rollout --model ./arith --prompt 37+48 --draft layers:1 --draft-tokens 2";
    let ended = lab.run(rollout).fine();
    let warning =
        "warning: the head of layers:1 is untrained (the model has one for layers:2); a run";
    assert_eq!(times(&ended, warning), 1, "{ended:?}");
}

#[test]
fn commands_without_a_draft_say_so() {
    let lab = Lab::new();
    let sft = "sft --config run.yaml --data rows.jsonl --steps 1 --batch 2 --quiet";
    let bench = "--config run.yaml --batch 1";
    let spec = "bench spec --config run.yaml --drafts ngram --batches 1 --new-tokens 4 --repeats 1";
    for (command, name) in [
        (format!("{sft} --out OUT"), "sft"),
        (
            format!("bench train {bench} --tokens 8 --steps 1"),
            "bench train",
        ),
        (
            format!("bench rollout {bench} --repeats 1"),
            "bench rollout",
        ),
        (
            spec.to_owned(),
            "bench spec, which measures those of --drafts",
        ),
    ] {
        let warning = format!("warning: draft has no effect on {name}\n");
        let run = |out: &str, flags: &str| {
            lab.run(&format!("{} {flags}", command.replace("OUT", out)))
                .fine()
        };
        let out = |kind: &str| format!("{}-{kind}", name.replace([' ', ','], "-"));
        assert_eq!(times(&run(&out("a"), "--set draft=suffix"), &warning), 1);
        assert_eq!(times(&run(&out("b"), ""), "warning"), 0);
        assert_eq!(times(&run(&out("c"), "--set draft=none"), "warning"), 0);
    }
    // The built-in run has a draft that nobody asked for.
    let ended = lab.run("bench train --batch 1 --tokens 8 --steps 1").fine();
    assert_eq!(times(&ended, "warning"), 0, "{ended:?}");
}

#[test]
fn the_draft_of_a_run_and_of_the_example_are_found() {
    let lab = Lab::new();
    let draft = lab.model().display().to_string();
    lab.run(&format!(
        "{TRAIN} --steps 1 --draft model:{draft} --out a --quiet"
    ))
    .fine();
    let ended = lab.run(&format!("{ROLLOUT} --draft model:a"));
    let (error, hint) = ended.refused(1);
    assert_eq!(error, "draft `a` is the folder of a run, not a model");
    assert_eq!(hint, "use --draft model:a/draft");
    let rollout = |draft: &str| {
        let args = "rollout --prompt 37+48 --temperature 0 --draft-tokens 3 --json -n 3";
        lab.run(&format!("{args} --draft model:{draft}")).fine()
    };
    let embedded = rollout("embedded").json()["completions"][0].clone();
    let example = rollout(&example("draft")).json()["completions"][0].clone();
    assert!(embedded["telemetry"]["draft_tokens"].as_u64() > Some(0));
    for key in ["tokens", "drafts", "accepted_per_pos"] {
        assert_eq!(example[key], embedded[key], "{key}");
    }
    let help = lab.run("rollout --help").fine().stdout;
    assert!(help.contains("model:embedded"), "{help}");
}

#[test]
fn bench_spec_checks_all_drafts_first_and_measures_each_thing_once() {
    let lab = Lab::new();
    let bench = "bench spec --config run.yaml --repeats 1";
    let ended = lab.run(&format!("{bench} --drafts ngram,layers:9 --batches 1"));
    let (error, _) = ended.refused(1);
    assert_eq!(error, "draft layers:9 of a policy with 2 layers");
    assert_eq!(ended.stdout, "");
    let flags = "--drafts ngram,none,ngram --batches 2,1,2 --json";
    let ended = lab.run(&format!("{bench} {flags} --new-tokens 400")).fine();
    let metrics = ended.json()["metrics"].clone();
    let measured = metrics.as_array().unwrap().iter().map(|m| {
        (
            m["draft"].as_str().unwrap().to_owned(),
            m["batch"].as_u64().unwrap(),
        )
    });
    let expected = [("none", 2), ("none", 1), ("ngram", 2), ("ngram", 1)];
    assert!(
        measured.eq(expected.map(|(d, b)| (d.to_owned(), b))),
        "{metrics}"
    );
    let cut = "warning: --new-tokens 400 is cut to the context of 256 tokens: completions have as few as ";
    assert_eq!(times(&ended, cut), 1, "{ended:?}");
    let ended = lab.run(&format!(
        "{bench} --drafts ngram --batches 1 --new-tokens 8"
    ));
    assert_eq!(times(&ended.fine(), "warning"), 0);
}

/// With a frozen policy every evaluation has the same completions, so what the suffix draft remembers of the last one
/// would be all that can change its reward; and training must not know whether there was one.
#[test]
fn an_evaluation_neither_uses_nor_leaves_what_a_draft_remembers() {
    let lab = Lab::new();
    let rows: Vec<String> = (0..12)
        .map(|i| format!(r#"{{"question": "abc{i}"}}"#))
        .collect();
    lab.write("plain.jsonl", rows.join("\n"));
    let frozen = "train --config run.yaml --data plain.jsonl --set eval_data=plain.jsonl --draft suffix --draft-tokens 3 \
                  --set learning_rate=1e-12 --set temperature=0.1 --set max_steps=3 --json";
    let reward = r#"--set plugins=[{"source":"reward-inference","config":{"latency_weight":0}}]"#;
    let run = |name: &str, eval: &str| {
        let args = format!("{frozen} {reward} --set eval_steps={eval} --out {name}");
        lab.run(&args).fine().json()
    };
    let json = run("often", "1");
    let lines = lab.metrics("often");
    let of = |metric: &str| -> Vec<f64> {
        lines
            .iter()
            .filter_map(|line| line.get(metric)?.as_f64())
            .collect()
    };
    let rewards = of("eval_reward");
    assert!(rewards.len() >= 3, "{rewards:?}");
    assert!(
        rewards.iter().all(|r| (r - rewards[0]).abs() < 1e-9),
        "{rewards:?}"
    );
    // Rows without an answer have no accuracy.
    assert_eq!(json["best_accuracy"], serde_json::Value::Null);
    assert_eq!(json["best_reward"].as_f64(), Some(rewards[0]));
    run("never", "0");
    let drafted = |name: &str| -> Vec<Option<f64>> {
        let metric = "spec_decode/num_accepted_tokens";
        let lines = lab.metrics(name);
        let trained = lines.iter().filter(|line| line["step"] != 0);
        trained.map(|line| line.get(metric)?.as_f64()).collect()
    };
    assert_eq!(drafted("often"), drafted("never"));
    assert!(drafted("never").iter().any(|n| n.is_some_and(|n| n > 0.0)));
}
