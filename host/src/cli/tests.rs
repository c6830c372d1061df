//! Parsing of the command line and what it does to the config.

use clap::CommandFactory;

use super::*;

fn parse(args: &[&str]) -> Command {
    Cli::try_parse_from(["grpo-host"].iter().chain(args))
        .unwrap()
        .into_command()
}

fn train(args: &[&str]) -> TrainArgs {
    match parse(args) {
        Command::Train(args) => args,
        other => panic!("parsed as {other:?}"),
    }
}

fn refuse(args: &[&str]) -> String {
    Cli::try_parse_from(["grpo-host"].iter().chain(args))
        .unwrap_err()
        .to_string()
}

#[test]
fn definitions_are_consistent() {
    Cli::command().debug_assert();
}

#[test]
fn train_is_the_default_command_and_the_flags_are_the_same() {
    assert!(train(&[]).plugins.is_empty());
    for prefix in [&[][..], &["train"]] {
        let flags = [
            "--plugin",
            "a.wasm=0.8",
            "--plugin",
            "b.wasm",
            "--steps",
            "3",
            "--json",
        ];
        let args = train(&[prefix, &flags].concat());
        assert!(args.output.json && !args.output.quiet);
        let config = args.over(RawConfig::default()).unwrap().validate().unwrap();
        assert_eq!(config.training.max_steps, 3);
        let plugins: Vec<_> = config
            .plugins
            .plugins
            .iter()
            .map(|plugin| (plugin.source.as_str(), plugin.weight))
            .collect();
        assert_eq!(plugins, [("a.wasm", 0.8), ("b.wasm", 1.0)]);
    }
}

#[test]
fn flags_win_over_set_over_file_over_base() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("run.yaml");
    std::fs::write(&file, "max_steps: 2\nseed: 2\nbeta: 0.2\n").unwrap();
    let base =
        RawConfig::from_yaml("max_steps: 1\nseed: 1\nbeta: 0.1\nepsilon: 0.1", "base").unwrap();
    let file = file.to_str().unwrap();
    let args = train(&[
        "--config",
        file,
        "--set",
        "seed=3",
        "--set",
        "stop=['=']",
        "--steps",
        "4",
    ]);
    let config = args.over(base).unwrap().validate().unwrap();
    assert_eq!(config.training.max_steps, 4);
    assert_eq!(config.training.seed, 3);
    assert_eq!(config.loss.beta, 0.2);
    assert_eq!(config.loss.epsilon, 0.1);
    assert_eq!(config.generation.stop, ["="]);
}

#[test]
fn set_refuses_unknown_keys() {
    let error = train(&["--set", "sed=1"])
        .over(RawConfig::default())
        .unwrap_err();
    assert_eq!(error.to_string(), "--set: unknown key `sed`");
    assert_eq!(error.hint().unwrap(), "did you mean `seed`?");
}

#[test]
fn eval_flags_reach_their_keys() {
    let Command::Eval(args) = parse(&[
        "eval",
        "--data",
        "x.jsonl",
        "--samples",
        "4",
        "--limit",
        "9",
        "--temperature",
        "0.6",
    ]) else {
        panic!("not eval");
    };
    let config = args.over(RawConfig::default()).unwrap().validate().unwrap();
    assert_eq!(config.input.eval_data.as_deref(), Some("x.jsonl"));
    assert_eq!((config.eval.eval_samples, config.eval.eval_rows), (4, 9));
    assert_eq!(config.generation.temperature, 0.6);
}

#[test]
fn weights_follow_the_last_equals_sign() {
    let arg = |text: &str| text.parse::<PluginArg>();
    let plugin = |source: &str, weight| {
        Ok(PluginArg {
            source: source.to_owned(),
            weight,
        })
    };
    assert_eq!(arg("a.wasm"), plugin("a.wasm", None));
    assert_eq!(arg("a.wasm=0.8"), plugin("a.wasm", Some(0.8)));
    assert_eq!(arg("a.wasm=-1e-1"), plugin("a.wasm", Some(-0.1)));
    assert_eq!(arg("lr=3/a.wasm"), plugin("lr=3/a.wasm", None));
    assert_eq!(arg("k=v.wasm=2"), plugin("k=v.wasm", Some(2.0)));
    assert_eq!(arg("k=3=1"), plugin("k=3", Some(1.0)));
    assert_eq!(arg("reward-math=0.5"), plugin("reward-math", Some(0.5)));
    assert_eq!(
        arg("a.wasm=heavy"),
        Err("weight `heavy` is not a number".to_owned())
    );
    assert_eq!(
        arg("a.wasm=nan"),
        Err("weight `nan` is not finite".to_owned())
    );
    assert_eq!(
        arg("=1"),
        Err("no file or name before the weight".to_owned())
    );
    assert!(arg("").is_err());
}

#[test]
fn bad_usage_is_refused() {
    assert!(refuse(&["--resume", "r", "--out", "o"]).contains("cannot be used with"));
    assert!(refuse(&["--device", "tpu"]).contains("use auto, cpu or cuda:N"));
    assert!(
        refuse(&["sft", "--init-shape", "c.json", "--data", "d", "--out", "o"])
            .contains("--tokenizer")
    );
    assert!(
        refuse(&["swap"]).contains("unexpected argument 'swap'")
            || refuse(&["swap"]).contains("unrecognized subcommand 'swap'")
    );
}

#[test]
fn environment_follows_hugging_face() {
    let read = |vars: &[(&str, &str)]| {
        Environment::from_lookup(|name| {
            vars.iter()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| (*value).to_owned())
        })
    };
    assert_eq!(
        read(&[("HF_TOKEN", ""), ("HF_HUB_OFFLINE", "0")]),
        Environment::default()
    );
    assert_eq!(
        read(&[("HOME", "/h")]).hf_home,
        Some("/h/.cache/huggingface".into())
    );
    let all = read(&[
        ("HOME", "/h"),
        ("XDG_CACHE_HOME", "/x"),
        ("HF_ENDPOINT", "http://localhost:8080/"),
        ("HF_TOKEN", "t\n"),
        ("HF_HUB_OFFLINE", "True"),
    ]);
    assert_eq!(all.hf_endpoint.as_deref(), Some("http://localhost:8080"));
    assert_eq!(all.hf_token.as_deref(), Some("t"));
    assert_eq!(all.hf_home, Some("/x/huggingface".into()));
    assert!(all.hf_hub_offline);
    assert_eq!(
        read(&[("HOME", "/h"), ("HF_HOME", "/f")]).hf_home,
        Some("/f".into())
    );
    assert_eq!(all.cache, Some("/x/grpo-host".into()));
    assert_eq!(all.settings, Some("/h/.config/grpo-host".into()));
    assert_eq!(all.docker_config, Some("/h/.docker/config.json".into()));
    let moved = read(&[("XDG_CONFIG_HOME", "/s"), ("DOCKER_CONFIG", "/d")]);
    assert_eq!(moved.settings, Some("/s/grpo-host".into()));
    assert_eq!(moved.docker_config, Some("/d/config.json".into()));
}
