//! Reading, overriding, refusing and writing back of configs.

use std::path::Path;

use super::*;

fn run(yaml: &str) -> RunConfig {
    RawConfig::from_yaml(yaml, "run.yaml")
        .unwrap()
        .validate()
        .unwrap()
}

/// The message and hint a bad config gives.
fn refusal(yaml: &str) -> (String, Option<String>) {
    let error = RawConfig::from_yaml(yaml, "run.yaml")
        .and_then(|raw| raw.validate())
        .unwrap_err();
    (error.to_string(), error.hint())
}

#[test]
fn empty_text_is_the_default() {
    assert_eq!(run(""), RunConfig::default());
    assert_eq!(run("# only a comment\n"), RunConfig::default());
    assert_eq!(run("{}"), RunConfig::default());
}

#[test]
fn every_key_is_documented() {
    let document = include_str!("../../../docs/configuration.md");
    let keys = validate::known_keys::<RunConfig>();
    assert!(keys.contains(&"loss_type".to_owned()), "{keys:?}");
    let missing: Vec<_> = keys
        .iter()
        .filter(|key| !document.contains(&format!("`{key}`")))
        .collect();
    assert_eq!(missing, Vec::<&String>::new());
}

#[test]
fn every_key_is_read_and_written_back() {
    let yaml = "
model: Qwen/Qwen2.5-0.5B
columns: {question: problem}
plugins:
  - source: reward-math
    weight: 0.5
    config: {partial: 0.25, tags: [a, b]}
    limits: {deadline_ms: 200}
num_generations: 4
temperature: 1
stop: ['</answer>']
kv_cache_tokens: 8192
loss_type: dr_grpo
beta: 4e-2
kl_estimator: k1
epsilon_high: 0.28
scale_rewards: none
importance_correction: {mode: token_truncate}
learning_rate: 1e-5
lr_scheduler_type: cosine
lora: {r: 8, target_modules: [q_proj, v_proj]}
early_stopping_patience: 3
output_dir: runs/x
device: cuda:1
rank: 0
world_size: 1
";
    let config = run(yaml);
    assert_eq!(config.input.model.as_deref(), Some("Qwen/Qwen2.5-0.5B"));
    assert_eq!(config.input.columns["question"], "problem");
    let plugin = &config.plugins.plugins[0];
    assert_eq!(
        (plugin.source.as_str(), plugin.weight),
        ("reward-math", 0.5)
    );
    assert_eq!(
        serde_json::to_string(&plugin.config).unwrap(),
        r#"{"partial":0.25,"tags":["a","b"]}"#
    );
    assert_eq!(plugin.limits["deadline_ms"], 200);
    assert_eq!(config.generation.num_generations, 4);
    assert_eq!(config.generation.stop, ["</answer>"]);
    assert_eq!(config.generation.kv_cache_tokens, Some(8192));
    assert_eq!(config.loss.loss_type, LossType::DrGrpo);
    assert_eq!(config.loss.beta, 0.04);
    assert_eq!(config.loss.kl_estimator, KlEstimator::K1);
    assert_eq!(config.loss.epsilon_high, Some(0.28));
    assert_eq!(config.loss.scale_rewards, ScaleRewards::None);
    assert_eq!(
        config.loss.importance_correction,
        ImportanceCorrection {
            mode: ImportanceMode::TokenTruncate,
            max: 3.0
        }
    );
    assert_eq!(config.optimizer.learning_rate, 1e-5);
    assert_eq!(config.optimizer.lr_scheduler_type, LrSchedule::Cosine);
    let lora = config.training.lora.as_ref().unwrap();
    assert_eq!((lora.r, lora.alpha), (8, 32.0));
    assert_eq!(lora.target_modules, ["q_proj", "v_proj"]);
    assert_eq!(config.eval.early_stopping_patience, Some(3));
    assert_eq!(
        config.output.output_dir.as_deref(),
        Some(Path::new("runs/x"))
    );
    assert_eq!(config.hardware.device, Device::Cuda(1));
    assert_eq!((config.hardware.rank, config.hardware.world_size), (0, 1));

    let written = config.to_yaml().unwrap();
    assert_eq!(run(&written), config);
}

#[test]
fn adapters_are_merged_or_not_or_as_the_weights_allow() {
    let merge = |text: &str| run(text).training.lora.unwrap().merge;
    assert_eq!(merge("lora: {}"), None);
    assert_eq!(merge("lora: {merge: false}"), Some(false));
    assert_eq!(merge("lora: {merge: true}"), Some(true));
}

#[test]
fn quantised_weights_are_kept_or_not() {
    let of = |text: &str| run(text).hardware.quantized_weights;
    assert_eq!(of(""), QuantizedWeights::Auto);
    assert_eq!(of("quantized_weights: keep"), QuantizedWeights::Keep);
    let config = run("quantized_weights: dequantize");
    assert_eq!(run(&config.to_yaml().unwrap()), config);
    let (error, _) = refusal("quantized_weights: 4bit");
    assert!(
        error.contains("4bit") && error.contains("dequantize"),
        "{error}"
    );
}

#[test]
fn a_gpu_lends_a_fraction_and_the_batch_may_be_open() {
    let default = RunConfig::default();
    assert_eq!(default.hardware.gpu_memory_utilization, 0.9);
    assert_eq!(default.generation.max_batch_size, None);
    let config = run("gpu_memory_utilization: 1\nmax_batch_size: 7");
    assert_eq!(config.hardware.gpu_memory_utilization, 1.0);
    assert_eq!(config.generation.max_batch_size, Some(7));
    assert_eq!(run(&config.to_yaml().unwrap()), config);
    for wrong in ["0", "-0.1", "1.001", ".nan", ".inf"] {
        let (error, hint) = refusal(&format!("gpu_memory_utilization: {wrong}"));
        assert!(
            error.ends_with("; allowed: a number above 0, up to 1"),
            "{error}"
        );
        assert!(hint.is_some());
    }
    let (error, _) = refusal("max_batch_size: 0");
    assert!(error.ends_with("`max_batch_size` is 0; allowed: 1 or more"));
}

#[test]
fn the_default_survives_its_own_yaml() {
    let written = RunConfig::default().to_yaml().unwrap();
    assert!(written.contains("\nloss_type: dapo\n"), "{written}");
    assert_eq!(run(&written), RunConfig::default());
}

#[test]
fn null_is_the_default() {
    assert_eq!(run("min_p: null\nlora: ~\nbeta:\n"), RunConfig::default());
}

#[test]
fn flags_win_over_the_file_and_later_files_over_earlier() {
    let mut raw = RawConfig::from_yaml("max_steps: 5\nseed: 1\nbeta: 0.1", "base").unwrap();
    raw.overlay(RawConfig::from_yaml("seed: 2", "run.yaml").unwrap());
    raw.set("max_steps", "--steps", 7).unwrap();
    let config = raw.validate().unwrap();
    assert_eq!(config.training.max_steps, 7);
    assert_eq!(config.training.seed, 2);
    assert_eq!(config.loss.beta, 0.1);
}

#[test]
fn unknown_keys_name_the_line_and_the_nearest_key() {
    let did_you_mean = |key: &str| Some(format!("did you mean `{key}`?"));
    for (yaml, message, hint) in [
        (
            "seed: 1\nlerning_rate: 1",
            "run.yaml:2: unknown key `lerning_rate`",
            did_you_mean("learning_rate"),
        ),
        (
            "steps: 1",
            "run.yaml:1: unknown key `steps`",
            did_you_mean("max_steps"),
        ),
        (
            "importance_correction:\n  # why\n  mdoe: off",
            "run.yaml:3: unknown key `importance_correction.mdoe`",
            did_you_mean("mode"),
        ),
        (
            "plugins:\n- source: a\n  weight: 1\n- source: b\n  wieght: 1",
            "run.yaml:5: unknown key `plugins.wieght`",
            did_you_mean("weight"),
        ),
        (
            "lora: {rr: 1}",
            "run.yaml: unknown key `lora.rr`",
            did_you_mean("r"),
        ),
        (
            "qqq: 1",
            "run.yaml:1: unknown key `qqq`",
            Some("config.yaml of any run directory lists all keys".to_owned()),
        ),
        (
            "1: 2",
            "run.yaml:1: unknown key `1`",
            Some("config.yaml of any run directory lists all keys".to_owned()),
        ),
    ] {
        assert_eq!(refusal(yaml), (message.to_owned(), hint), "{yaml}");
    }
}

#[test]
fn wrong_types_name_key_and_line() {
    let (message, _) = refusal("seed: 1\nmax_steps: many");
    assert_eq!(
        message,
        "run.yaml:2: `max_steps`: invalid type: string \"many\", expected u64"
    );
    let (message, _) = refusal("loss_type: ppo");
    assert!(
        message.starts_with("run.yaml:1: `loss_type`: "),
        "{message}"
    );
    assert!(
        message.contains("unknown variant `ppo`, expected one of `grpo`, `dr_grpo`"),
        "{message}"
    );
    let (message, _) = refusal("device: tpu");
    assert!(
        message.ends_with("`tpu` is not a device; use auto, cpu or cuda:N"),
        "{message}"
    );
    let (message, _) = refusal("max_steps: -1");
    assert!(
        message.contains("`max_steps`") && message.contains("-1"),
        "{message}"
    );
}

#[test]
fn several_gpus_are_refused_where_they_cannot_be() {
    for (yaml, message) in [
        ("gpus: 0", "run.yaml:1: `gpus` is 0; allowed: 1 to 64"),
        (
            "device: cpu\ngpus: 2",
            "run.yaml:2: `gpus` is 2; allowed: 1 with device cpu",
        ),
        (
            "gpus: 2\ndraft: suffix",
            "run.yaml:2: `draft` is suffix; allowed: none, ngram, model:PATH or layers:K with several gpus",
        ),
    ] {
        assert_eq!(refusal(yaml).0, message);
    }
}

#[test]
fn ranges_name_key_value_and_what_is_allowed() {
    for (yaml, message) in [
        (
            "num_generations: 1",
            "run.yaml:1: `num_generations` is 1; allowed: 2 to 65536 (one completion has nothing to be compared with)",
        ),
        (
            "temperature: 0",
            "run.yaml:1: `temperature` is 0; allowed: a number > 0",
        ),
        (
            "top_p: 1.5",
            "run.yaml:1: `top_p` is 1.5; allowed: above 0, up to 1",
        ),
        (
            "min_p: -0.1",
            "run.yaml:1: `min_p` is -0.1; allowed: 0 to 1",
        ),
        (
            "max_completion_length: 0",
            "run.yaml:1: `max_completion_length` is 0; allowed: 1 or more",
        ),
        (
            "stop: ['']",
            "run.yaml:1: `stop` is an empty string; allowed: texts of one character or more",
        ),
        (
            "beta: .nan",
            "run.yaml:1: `beta` is NaN; allowed: a number ≥ 0",
        ),
        ("epsilon: 2", "run.yaml:1: `epsilon` is 2; allowed: 0 to 1"),
        (
            "delta: 1",
            "run.yaml:1: `delta` is 1; allowed: a number > 1, or null",
        ),
        (
            "importance_correction: {max: 0}",
            "run.yaml:1: `importance_correction.max` is 0; allowed: a number > 0",
        ),
        (
            "learning_rate: .inf",
            "run.yaml:1: `learning_rate` is inf; allowed: a number > 0",
        ),
        (
            "adam_beta2: 1",
            "run.yaml:1: `adam_beta2` is 1; allowed: 0 or more, below 1",
        ),
        (
            "lora: {r: 0}",
            "run.yaml:1: `lora.r` is 0; allowed: 1 to 4096",
        ),
        (
            "plugins: [{weight: 1}]",
            "run.yaml:1: `plugins[0].source` is empty; allowed: a component file or a built-in plugin's name",
        ),
        (
            "\nrank: 2",
            "run.yaml:2: `rank` is 2; allowed: 0 or more, below world_size",
        ),
        (
            "world_size: 2",
            "run.yaml:1: `world_size` is 2; allowed: 1 (training over several processes is not built yet)",
        ),
        (
            "threads: 0",
            "run.yaml:1: `threads` is 0; allowed: 1 or more",
        ),
    ] {
        assert_eq!(refusal(yaml).0, message);
    }
}

#[test]
fn a_flag_out_of_range_is_named_by_its_flag() {
    let mut raw = RawConfig::default();
    raw.set("max_steps", "--steps", 0).unwrap();
    let error = raw.validate().unwrap_err();
    assert_eq!(
        error.to_string(),
        "--steps: `max_steps` is 0; allowed: 1 or more"
    );
    assert_eq!(
        error.hint().unwrap(),
        "`--steps` sets the config key `max_steps`"
    );
}

#[test]
fn broken_files_are_refused() {
    assert!(
        refusal("a: [1")
            .0
            .starts_with("run.yaml is not valid YAML: ")
    );
    assert!(
        refusal("seed: 1\nseed: 2")
            .0
            .contains("duplicate entry with key \"seed\"")
    );
    assert_eq!(refusal("- seed").0, "run.yaml holds no `key: value` lines");
    let error = RawConfig::from_file(Path::new("/nonexistent/run.yaml")).unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("cannot read config /nonexistent/run.yaml: No such file")
    );
}

#[test]
fn dynamic_sampling_is_a_flag_or_a_word() {
    let mode = |yaml: &str| {
        run(&format!("dynamic_sampling: {yaml}"))
            .loss
            .dynamic_sampling
    };
    assert_eq!(mode("false"), DynamicSampling::Off);
    assert_eq!(mode("true"), DynamicSampling::Refill);
    assert_eq!(mode("refill"), DynamicSampling::Refill);
    assert_eq!(mode("respend"), DynamicSampling::Respend);
    for yaml in ["false", "refill", "respend"] {
        let written = run(&format!("dynamic_sampling: {yaml}")).to_yaml().unwrap();
        let line = format!("\ndynamic_sampling: {yaml}\n");
        assert!(written.contains(&line), "{written}");
        assert_eq!(run(&written).loss.dynamic_sampling, mode(yaml));
    }
    let (error, _) = refusal("dynamic_sampling: reuse");
    assert!(
        error.ends_with(
            "`reuse` is no way of dynamic sampling; use false, refill (or true) or respend"
        ),
        "{error}"
    );
    let (error, _) = refusal("dynamic_sampling: respend\nnum_generations: 2");
    assert!(
        error
            .ends_with("allowed: respend with num_generations of 3 or more, since a probe takes 2"),
        "{error}"
    );
    assert_eq!(run("num_generations: 2").generation.num_generations, 2);
    for bad in ["0", "1", ".nan", "-0.5"] {
        let (error, hint) = refusal(&format!("probe_fraction: {bad}"));
        assert!(error.contains("a number above 0 and below 1"), "{error}");
        assert!(hint.is_some());
    }
}

#[test]
fn a_patience_that_never_runs_out_is_found() {
    let odd = |yaml: &str| run(&format!("max_steps: 10\n{yaml}")).idle_patience();
    assert_eq!(odd("eval_steps: 0"), None);
    // Steps 3, 6 and 9 against the start.
    for (patience, fine) in [(3, true), (4, false)] {
        let yaml = format!("eval_steps: 3\nearly_stopping_patience: {patience}");
        assert_eq!(odd(&yaml).is_none(), fine, "{patience}");
        // Without one at the start the first of them is the best.
        let yaml =
            format!("eval_steps: 2\neval_on_start: false\nearly_stopping_patience: {patience}");
        assert_eq!(odd(&yaml).is_none(), fine, "{patience}");
    }
    for every in [0, 10, 11] {
        let expected = format!(
            "early_stopping_patience 1 cannot end this run: with eval_steps {every} it has 0 evaluations \
             before its last step"
        );
        let found = odd(&format!("eval_steps: {every}\nearly_stopping_patience: 1"));
        assert_eq!(found, Some(expected));
    }
}

#[test]
fn values_of_another_type_are_refused_with_what_is_allowed() {
    for yaml in ["true", "-1", "2.5", "[3]"] {
        let (error, _) = refusal(&format!("draft_tokens: {yaml}"));
        let text = "`draft_tokens`: a draft length is auto or 1 to 16";
        assert!(error.ends_with(text), "{yaml}: {error}");
    }
    for yaml in ["1", "[]", "{a: 1}"] {
        let (error, _) = refusal(&format!("dynamic_sampling: {yaml}"));
        let text = "`dynamic_sampling`: dynamic sampling is false, refill (or true) or respend";
        assert!(error.ends_with(text), "{yaml}: {error}");
    }
}

#[test]
fn numbers_that_json_does_not_have_are_named_inside_a_plugins_config() {
    let (message, _) = refusal(
        "seed: 1\nplugins:\n- source: reward-math\n- source: a\n  config: {list: [1, {deep: .nan}]}",
    );
    assert_eq!(
        message,
        "run.yaml:2: `plugins[1].config.list[1].deep` is NaN; allowed: a finite number"
    );
    let (message, _) = refusal("plugins: [{source: a, config: {x: -.inf}}]");
    assert!(
        message.contains("`plugins[0].config.x` is -inf"),
        "{message}"
    );
    let (message, _) = refusal("learning_rate: .nan");
    assert!(
        message.contains("`learning_rate` is NaN; allowed: "),
        "{message}"
    );
    let (message, _) = refusal("plugins: [{source: a, weight: 1e300}]");
    assert!(
        message.contains("allowed: a number within ±1e9"),
        "{message}"
    );
}
