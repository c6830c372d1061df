//! The component: rows and completions become questions to the judge, its answers become rewards.

use crate::metrics::visibility;
use crate::score::{Config, Task, reward};
use judge_text::without_thinking;
use std::cell::RefCell;

wit_bindgen::generate!({ path: "../../wit/v0.1", world: "reward" });

use exports::grpo::plugin::scoring::Guest;
use grpo::plugin::judge::{JudgeError, Reply, Request, complete};
use grpo::plugin::types::{Message, Part, PluginError, Question, Sample, Scored, Verdict};

struct RewardGeo;

thread_local! {
    static CONFIG: RefCell<Config> = RefCell::new(Config::default());
}

type Answer = Result<Reply, JudgeError>;

impl Guest for RewardGeo {
    fn configure(config: String) -> Result<(), PluginError> {
        let config =
            serde_json::from_str(&config).map_err(|e| PluginError::Config(e.to_string()))?;
        CONFIG.set(config);
        Ok(())
    }

    fn score(questions: Vec<Question>, samples: Vec<Sample>) -> Result<Vec<Verdict>, PluginError> {
        CONFIG.with_borrow(|config| {
            let read = |question: &Question| -> Result<Task, PluginError> {
                let row = serde_json::from_str(&question.row);
                let row = row.map_err(|e| PluginError::Input(format!("row: {e}")))?;
                Task::read(config, &row).map_err(PluginError::Input)
            };
            let tasks = questions.iter().map(read).collect::<Result<Vec<_>, _>>()?;
            let tasks_of = samples
                .iter()
                .map(|sample| &tasks[sample.question as usize]);
            let rewritten: Vec<String> = samples.iter().map(text).collect();
            let pairs: Vec<(&Task, &String)> = tasks_of.zip(&rewritten).collect();
            // All at once: originals, then rewritten ones, then key points.
            let mut asked: Vec<String> = tasks.iter().map(|task| task.question(None)).collect();
            asked.extend(pairs.iter().map(|(task, text)| task.question(Some(text))));
            if config.keypoints.is_some() {
                asked.extend(pairs.iter().map(|(task, text)| task.check(text)));
            }
            let answers = ask(config, asked)?;
            let (originals, rest) = answers.split_at(tasks.len());
            let (answers, checks) = rest.split_at(samples.len());
            let judge = |(i, sample): (usize, &Sample)| {
                let original = &originals[sample.question as usize];
                let scored = verdict(config, pairs[i].0, [original, &answers[i]], checks.get(i));
                scored.unwrap_or_else(Verdict::Skip)
            };
            Ok(samples.iter().enumerate().map(judge).collect())
        })
    }
}

fn text(sample: &Sample) -> String {
    without_thinking(sample.answer.as_deref().unwrap_or(&sample.completion))
}

fn ask(config: &Config, asked: Vec<String>) -> Result<Vec<Answer>, PluginError> {
    let request = |content: String| Request {
        messages: vec![Message {
            role: "user".to_owned(),
            content,
        }],
        max_tokens: config.max_tokens,
    };
    let requests: Vec<Request> = asked.into_iter().map(request).collect();
    let answers = complete(&requests);
    match answers.len() == requests.len() {
        true => Ok(answers),
        false => Err(PluginError::Internal(
            "the judge left requests out".to_owned(),
        )),
    }
}

fn said(answer: &Answer) -> Result<String, String> {
    match answer {
        Ok(reply) => Ok(without_thinking(&reply.text)),
        Err(error) => Err(format!("the judge did not answer: {}", why(error))),
    }
}

fn verdict(
    config: &Config,
    task: &Task,
    answers: [&Answer; 2],
    check: Option<&Answer>,
) -> Result<Verdict, String> {
    let shares = |answer| said(answer).map(|text| visibility(&text, task.sources.len()));
    let [before, after] = answers.map(shares);
    let before = before?;
    if before.iter().all(|share| share.word == 0.0) {
        return Err("the judge cites no source of the original row".to_owned());
    }
    // A rewritten source after which nothing is cited is invisible. To skip it would let a policy dodge its loss.
    let shares = [before[task.target], after?[task.target]];
    let rates = check.map(|answer| said(answer).map(|text| task.rates(&text)));
    let (total, parts) = reward(config, shares, rates.transpose()?);
    let part = |(name, value): (&str, f64)| Part {
        name: name.to_owned(),
        value,
    };
    Ok(Verdict::Value(Scored {
        total,
        parts: parts.into_iter().map(part).collect(),
    }))
}

fn why(error: &JudgeError) -> &str {
    match error {
        JudgeError::Timeout => "no answer in time",
        JudgeError::Exhausted(why) | JudgeError::Refused(why) | JudgeError::Unavailable(why) => why,
    }
}

export!(RewardGeo);
