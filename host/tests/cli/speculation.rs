//! Speculative decoding from the command line.

use super::lab::Lab;

const ROLLOUT: &str =
    "rollout --config run.yaml --raw --prompt abcabcab -n 3 --max-tokens 12 --json";

#[test]
fn greedy_rollouts_do_not_depend_on_the_draft() {
    let lab = Lab::new();
    let model = format!("model:{}", lab.model().display());
    let rollout = |draft: &str| {
        let args = format!("{ROLLOUT} --temperature 0 --draft {draft} --draft-tokens 3");
        lab.run(&args).fine().json()["completions"].clone()
    };
    let plain = rollout("none");
    assert_eq!(plain[0]["telemetry"]["draft_tokens"], 0);
    for draft in ["ngram", "suffix", "layers:1", &model] {
        let drafted = rollout(draft);
        for i in 0..3 {
            assert_eq!(drafted[i]["tokens"], plain[i]["tokens"], "{draft}");
        }
        let total = |key: &str| -> u64 {
            (0..3)
                .map(|i| drafted[i]["telemetry"][key].as_u64().unwrap())
                .sum()
        };
        if draft == model {
            assert!(total("draft_tokens") > 0);
            assert!(total("accepted_tokens") > 0, "{drafted}");
        }
    }
}

#[test]
fn acceptance_is_printed_where_something_was_drafted() {
    let lab = Lab::new();
    let args = ROLLOUT.replace(" --json", "");
    let plain = lab.run(&args).fine().stdout;
    assert!(
        plain.contains(" tokens, ") && !plain.contains("accept_rate"),
        "{plain}"
    );
    let model = lab.model();
    let model = model.display();
    let drafted = lab.run(&format!(
        "{args} --temperature 0 --draft model:{model} --draft-tokens 2"
    ));
    let stdout = drafted.fine().stdout;
    assert!(
        stdout.contains("accept_rate=") && stdout.contains(" draft tokens accepted)"),
        "{stdout}"
    );
}

#[test]
fn evaluation_says_what_was_accepted() {
    let lab = Lab::new();
    let model = lab.model();
    let eval = "eval --config run.yaml --data rows.jsonl --draft-tokens 2";
    let draft = format!("{eval} --draft model:{}", model.display());
    let json = lab.run(&format!("{draft} --json")).fine().json();
    let number = |key: &str| json[key].as_u64().unwrap();
    let (accepted, drafted) = (number("accepted_tokens"), number("draft_tokens"));
    assert!(accepted > 0 && drafted <= 2 * number("drafts"), "{json}");
    let rate = accepted as f64 / drafted as f64;
    assert_eq!(json["acceptance_rate"].as_f64(), Some(rate));
    let per_pos: Vec<u64> = serde_json::from_value(json["accepted_per_pos"].clone()).unwrap();
    assert_eq!(per_pos.iter().sum::<u64>(), accepted);
    let table = lab.run(&draft).fine().stdout;
    let percent = 100.0 * rate;
    let line =
        format!("draft  accept_rate={percent:.1}% ({accepted}/{drafted} draft tokens accepted)\n");
    assert!(table.contains(&line), "{table}");
    // Nothing drafted, no rate.
    let json = lab.run(&format!("{eval} --json")).fine().json();
    assert!(json["acceptance_rate"].is_null(), "{json}");
    let table = lab.run(eval).fine().stdout;
    assert!(!table.contains("accept"), "{table}");
}

#[test]
fn training_logs_acceptance_and_resumes_exactly() {
    let lab = Lab::new();
    let flags = "--draft suffix --draft-tokens 2 --set save_steps=1 --set temperature=0.05";
    // Few rows, so that prompts come again and there is something to learn.
    lab.write(
        "few.jsonl",
        "{\"question\": \"1\", \"answer\": \"2\"}\n".repeat(9),
    );
    let whole = format!("train --config run.yaml --data few.jsonl --quiet {flags}");
    let table = lab.run(&format!("{whole} --out a")).fine().stdout;
    let lines = lab.metrics("a");
    let total = |key: &str| -> f64 {
        lines
            .iter()
            .filter_map(|line| line.get(key)?.as_f64())
            .sum()
    };
    let (accepted, drafted) = (
        total("spec_decode/num_accepted_tokens"),
        total("spec_decode/num_draft_tokens"),
    );
    let counts = format!("({accepted} of {drafted} tokens; suffix, 2 tokens at a time)\n");
    assert!(table.contains(&counts), "{table}");
    let last = lines.last().unwrap();
    let number = |key: &str| last[key].as_f64().unwrap();
    let rate = number("spec_decode/num_accepted_tokens") / number("spec_decode/num_draft_tokens");
    assert!((rate - number("spec_decode/acceptance_rate")).abs() < 1e-12);
    let length = 1.0 + number("spec_decode/num_accepted_tokens") / number("spec_decode/num_drafts");
    assert!((length - number("spec_decode/mean_accepted_length")).abs() < 1e-12);
    let first = number("spec_decode/accepted_per_pos/0");
    assert!(first > 0.0 && first >= number("spec_decode/accepted_per_pos/1"));

    let mut child = lab.run_until(3, "b", &format!("{whole} --out b"));
    child.kill().unwrap();
    child.wait().unwrap();
    lab.run("train --quiet --resume b").fine();
    assert_eq!(lab.metrics("b"), lines);
    assert_eq!(lab.completions("b"), lab.completions("a"));
}

#[test]
fn a_draft_model_learns_along_and_resumes_exactly() {
    let lab = Lab::new();
    learns_and_resumes(&lab, &format!("model:{}", lab.model().display()));
    // The draft as it is at the end can be used on its own.
    let rollout = format!("{ROLLOUT} --model a/model --draft model:a/draft --draft-tokens 2");
    lab.run(&rollout).fine();
    let before = std::fs::read(lab.model().join("model.safetensors")).unwrap();
    assert_ne!(
        std::fs::read(lab.path("a/draft/model.safetensors")).unwrap(),
        before
    );
}

#[test]
fn an_early_exit_learns_along_and_resumes_exactly() {
    let lab = Lab::new();
    learns_and_resumes(&lab, "layers:1");
    // Its head lies with the model, and is what drafts there.
    let accepted = |lab: &Lab| {
        let args = format!("{ROLLOUT} --model a/model --draft layers:1 --draft-tokens 2 --seed 3");
        let args = args.replace("-n 3", "-n 200");
        let json = lab.run(&args).fine().json();
        let completions = json["completions"].as_array().unwrap();
        let accepted = completions
            .iter()
            .map(|c| c["telemetry"]["accepted_tokens"].as_u64().unwrap());
        accepted.sum::<u64>()
    };
    let trained = accepted(&lab);
    let head = lab.path("a/model/draft_head/layers-1.safetensors");
    std::fs::remove_file(&head).unwrap();
    let untrained = accepted(&lab);
    assert!(
        trained > untrained,
        "{trained} accepted, untrained {untrained}"
    );
    std::fs::write(&head, "no weights").unwrap();
    let ended = lab.run(&format!("{ROLLOUT} --model a/model --draft layers:1"));
    let (error, hint) = ended.refused(1);
    assert!(error.contains("layers-1.safetensors"), "{error}");
    assert!(hint.contains("draft_head"), "{hint}");
}

/// Eight steps with this draft: its loss falls, a killed run ends like another, a rate of 0 teaches nothing.
#[track_caller]
fn learns_and_resumes(lab: &Lab, draft: &str) {
    let flags = format!(
        "--draft {draft} --draft-tokens 2 --set save_steps=1 --set draft_learning_rate=3e-3"
    );
    let start = format!("train --config run.yaml --quiet --steps 8 {flags}");
    lab.run(&format!("{start} --out a")).fine();
    let lines = lab.metrics("a");
    let loss = |i: usize| lines[i]["draft/loss"].as_f64().unwrap();
    assert!(loss(8) < loss(1), "{} to {}", loss(1), loss(8));
    assert!(lines[1]["draft/grad_norm"].as_f64().unwrap() > 0.0);

    let mut child = lab.run_until(3, "b", &format!("{start} --out b"));
    child.kill().unwrap();
    child.wait().unwrap();
    lab.run("train --quiet --resume b").fine();
    assert_eq!(lab.metrics("b"), lines);
    assert_eq!(lab.completions("b"), lab.completions("a"));

    // Left alone it says nothing of itself.
    lab.run(&format!("{start} --out c --set draft_learning_rate=0"))
        .fine();
    let untaught = lab.metrics("c");
    assert!(!untaught[8].contains_key("draft/loss"));
}

#[test]
fn impossible_drafts_are_refused() {
    let lab = Lab::new();
    let refused = |draft: &str, code| {
        let ended = lab.run(&format!("{ROLLOUT} --draft {draft}"));
        let (error, hint) = ended.refused(code);
        (error.to_owned(), hint.to_owned())
    };
    let (error, hint) = refused("eagle", 2);
    assert!(
        error.ends_with("use none, ngram, suffix, model:PATH or layers:K"),
        "{error}"
    );
    assert_eq!(hint, "`--help` lists commands and flags");
    // Commands that guess nothing do not take the flag and ignore it.
    let ended = lab.run("bench train --draft ngram");
    let (error, _) = ended.refused(2);
    assert_eq!(error, "unexpected argument '--draft' found");
    let (error, hint) = refused("layers:2", 1);
    assert_eq!(error, "draft layers:2 of a policy with 2 layers");
    assert_eq!(hint, "use layers:1 to layers:1");
    // The same model with two tokens exchanged.
    let other = lab.path("other");
    std::fs::create_dir(&other).unwrap();
    for file in ["config.json", "tokenizer_config.json", "model.safetensors"] {
        std::fs::copy(lab.model().join(file), other.join(file)).unwrap();
    }
    let tokenizer = std::fs::read(lab.model().join("tokenizer.json")).unwrap();
    let mut tokenizer: serde_json::Value = serde_json::from_slice(&tokenizer).unwrap();
    let vocabulary = tokenizer["model"]["vocab"].as_object_mut().unwrap();
    let (a, b) = (vocabulary["A"].take(), vocabulary["B"].take());
    let first = a.as_u64().unwrap().min(b.as_u64().unwrap());
    (vocabulary["A"], vocabulary["B"]) = (b, a);
    lab.write("other/tokenizer.json", tokenizer.to_string());
    let (error, _) = refused("model:./other", 1);
    let expected = format!(
        "draft `./other` has another tokenizer than the policy: token {first} is `B` there and `A` here"
    );
    assert_eq!(error, expected);
}
