//! The component: rows and completions become questions to the judge, its answers become rewards.

use crate::rubric::Config;
use serde_json::{Map, Value};
use std::cell::RefCell;

wit_bindgen::generate!({ path: "../../wit/v0.1", world: "reward" });

use exports::grpo::plugin::scoring::Guest;
use grpo::plugin::judge::{JudgeError, Reply, Request, complete};
use grpo::plugin::types::{Message, Part, PluginError, Question, Sample, Scored, Verdict};

struct RewardJudge;

thread_local! {
    static CONFIG: RefCell<Config> = RefCell::new(Config::default());
}

impl Guest for RewardJudge {
    fn configure(config: String) -> Result<(), PluginError> {
        let config: Config =
            serde_json::from_str(&config).map_err(|e| PluginError::Config(e.to_string()))?;
        config.check().map_err(PluginError::Config)?;
        CONFIG.set(config);
        Ok(())
    }

    fn score(questions: Vec<Question>, samples: Vec<Sample>) -> Result<Vec<Verdict>, PluginError> {
        CONFIG.with_borrow(|config| {
            let rows = questions
                .iter()
                .map(|question| serde_json::from_str(&question.row));
            let rows = rows.collect::<Result<Vec<Map<String, Value>>, _>>();
            let rows = rows.map_err(|e| PluginError::Input(format!("row: {e}")))?;
            let request = |sample: &Sample| {
                let text = sample.answer.as_deref().unwrap_or(&sample.completion);
                let content = config.question(&rows[sample.question as usize], text)?;
                let role = "user".to_owned();
                Ok(Request {
                    messages: vec![Message { role, content }],
                    max_tokens: config.max_tokens,
                })
            };
            let requests = samples
                .iter()
                .map(request)
                .collect::<Result<Vec<_>, String>>();
            let requests = requests.map_err(PluginError::Input)?;
            let answers = complete(&requests);
            Ok(answers
                .iter()
                .map(|answer| verdict(config, answer))
                .collect())
        })
    }
}

fn verdict(config: &Config, answer: &Result<Reply, JudgeError>) -> Verdict {
    let reply = match answer {
        Ok(reply) => reply,
        Err(error) => return Verdict::Skip(format!("the judge did not answer: {}", why(error))),
    };
    match config.reward(&reply.text) {
        None => Verdict::Skip("the judge's answer holds no number within the range".to_owned()),
        Some((total, number)) => Verdict::Value(Scored {
            total,
            parts: number.map(part).into_iter().collect(),
        }),
    }
}

fn part(value: f64) -> Part {
    let name = "judge".to_owned();
    Part { name, value }
}

fn why(error: &JudgeError) -> &str {
    match error {
        JudgeError::Timeout => "no answer in time",
        JudgeError::Exhausted(why) | JudgeError::Refused(why) | JudgeError::Unavailable(why) => why,
    }
}

export!(RewardJudge);
