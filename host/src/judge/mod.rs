//! Judges: models that plugins may ask for an opinion, behind an OpenAI-compatible endpoint or in this process.
//!
//! Owns questions from a batch to their answers: cache, limits, attempts, account. Who may ask whom is decided by
//! grants, elsewhere. A judge that is slow, wrong or gone costs answers, never the run: every call comes back by its
//! deadline with a result for each question. (A model in this process can be late: see `local`.)

mod cache;
mod endpoint;
mod error;
mod health;
mod ledger;
mod local;
mod panel;
mod rate;
mod wire;

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::{runtime::Runtime, task::JoinSet};

use crate::{
    config::JudgeConfig,
    types::{Finish, Message},
};
use cache::{Cache, Found};
use endpoint::{Call, Endpoint};
pub use error::{JudgeError, JudgeSetupError};
use ledger::Ledger;
pub use ledger::Usage;
use local::Local;
pub use panel::{Panel, Surroundings};

/// Texts that are embedded by one request.
const EMBEDDED_AT_ONCE: usize = 64;

/// A question for a chat model.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Not empty.
    pub messages: &'a [Message],
    /// Most tokens of the answer, at least 1.
    pub max_tokens: u32,
}

/// What the model said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    pub text: String,
    pub finish: Finish,
    /// As the endpoint counts, 0 where it does not.
    pub prompt_tokens: u32,
    pub completion_tokens: u32,
}

/// A judge. A clone is the same one: it shares limits, cache and account.
#[derive(Clone)]
pub struct Judge(Arc<Shared>);

struct Shared {
    name: String,
    config: JudgeConfig,
    source: Source,
    cache: Option<Cache>,
    ledger: Arc<Ledger>,
    notes: Notes,
}

enum Source {
    Remote {
        endpoint: Arc<Endpoint>,
        workers: Arc<Workers>,
    },
    Local {
        model: Box<Mutex<Local>>,
        memory: String,
    },
}

/// The threads on which requests wait, of all judges together.
struct Workers(Option<Runtime>);

/// Lines for the user: of each kind one.
#[derive(Default)]
struct Notes(Mutex<(HashSet<String>, Vec<String>)>);

/// Told of each answer: the question's place among those asked, and what came of it.
type Tell<'t, T> = &'t mut dyn FnMut(usize, Result<T, JudgeError>);

impl Judge {
    /// One answer for each request, in their order, by `deadline`. `plugin` is who asks, for the user to read.
    ///
    /// Blocks; not to be called on an async thread.
    pub fn complete(
        &self,
        plugin: &str,
        requests: &[Request<'_>],
        deadline: Instant,
    ) -> Vec<Result<Reply, JudgeError>> {
        match &self.0.source {
            Source::Remote { endpoint, workers } => {
                let config = &self.0.config;
                let bodies: Vec<String> = requests.iter().map(|r| wire::chat(config, r)).collect();
                let keys = bodies.iter().zip(requests).map(|(body, request)| {
                    refuse_empty(request)?;
                    Ok(cache::key(&[endpoint.base(), wire::CHAT, body]))
                });
                self.answer(plugin, keys.collect(), |places, tell| {
                    let call = |place: &usize| {
                        let request = &requests[*place];
                        let texts = request.messages.iter().map(|m| m.content.as_str());
                        let call = Call {
                            path: wire::CHAT,
                            body: bodies[*place].clone(),
                            estimate: wire::estimate(texts) + u64::from(request.max_tokens),
                            values: 1,
                            read: |body, _| wire::read_reply(body),
                        };
                        (call, vec![*place])
                    };
                    workers.ask(endpoint, places.iter().map(call), deadline, tell);
                })
            }
            Source::Local { model, .. } => {
                let (prompts, keys) = lock(model).prompts(requests);
                self.answer(plugin, keys, |places, tell| {
                    lock(model).ask(&prompts, places, deadline, &self.0.ledger, tell);
                })
            }
        }
    }

    /// One vector for each text, in their order, by `deadline`; all of the same length.
    ///
    /// Blocks; not to be called on an async thread.
    pub fn embed(
        &self,
        plugin: &str,
        texts: &[String],
        deadline: Instant,
    ) -> Vec<Result<Vec<f32>, JudgeError>> {
        let model = self.0.config.embedding_model.as_deref();
        let (Source::Remote { endpoint, workers }, Some(model)) = (&self.0.source, model) else {
            let why = format!("judge `{}` has no embedding_model", self.0.name);
            return vec![Err(JudgeError::Refused(why)); texts.len()];
        };
        let key = |text: &String| {
            let body = wire::embeddings(model, &[text]);
            Ok(cache::key(&[endpoint.base(), wire::EMBEDDINGS, &body]))
        };
        let keys = texts.iter().map(key).collect();
        let mut vectors = self.answer(plugin, keys, |places, tell| {
            let calls = places.chunks(EMBEDDED_AT_ONCE).map(|places| {
                let texts: Vec<&str> = places.iter().map(|p| texts[*p].as_str()).collect();
                let call = Call {
                    path: wire::EMBEDDINGS,
                    body: wire::embeddings(model, &texts),
                    estimate: wire::estimate(texts),
                    values: places.len(),
                    read: wire::read_embeddings,
                };
                (call, places.to_vec())
            });
            workers.ask(endpoint, calls, deadline, tell);
        });
        refuse_other_lengths(&mut vectors);
        vectors
    }

    /// Under which the config has it.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Counts since it was opened.
    pub fn usage(&self) -> Usage {
        self.0.ledger.usage()
    }

    /// Answers by the cache, and what it does not have by `ask`, which is told the places of questions that differ from
    /// one another.
    fn answer<T: Clone + Serialize + DeserializeOwned>(
        &self,
        plugin: &str,
        keys: Vec<Result<String, JudgeError>>,
        ask: impl FnOnce(&[usize], Tell<'_, T>),
    ) -> Vec<Result<T, JudgeError>> {
        let begun = Instant::now();
        let (mut cached, mut missing) = (0, Vec::new());
        let mut answers: Vec<Option<Result<T, JudgeError>>> = Vec::with_capacity(keys.len());
        // Completions of a group are often equal, and so are the questions about them.
        let mut first: HashMap<&str, usize> = HashMap::new();
        let mut same_as = vec![None; keys.len()];
        for (place, key) in keys.iter().enumerate() {
            let answer = match key {
                Err(refused) => Some(Err(refused.clone())),
                Ok(key) => match first.get(key.as_str()) {
                    Some(earlier) => {
                        same_as[place] = Some(*earlier);
                        None
                    }
                    None => {
                        first.insert(key, place);
                        let known = self.known(key);
                        cached += u64::from(known.is_some());
                        if known.is_none() {
                            missing.push(place);
                        }
                        known.map(Ok)
                    }
                },
            };
            answers.push(answer);
        }
        if self.0.config.offline {
            let why = "it is offline, and this question is not in the cache";
            for place in missing {
                answers[place] = Some(Err(JudgeError::Unavailable(why.to_owned())));
            }
        } else if !missing.is_empty() {
            ask(&missing, &mut |place, answer| {
                if let (Ok(answer), Some(Ok(key))) = (&answer, keys.get(place)) {
                    self.keep(key, answer);
                }
                answers[place] = Some(answer);
            });
        }
        for (place, earlier) in same_as.iter().enumerate() {
            if let Some(earlier) = earlier {
                cached += u64::from(matches!(answers[*earlier], Some(Ok(_))));
                answers[place] = answers[*earlier].clone();
            }
        }
        let answers: Vec<_> = answers
            .into_iter()
            .map(|answer| answer.unwrap_or(Err(JudgeError::Timeout)))
            .collect();
        self.tell_failures(plugin, &answers);
        let failures = answers.iter().filter(|a| a.is_err()).count() as u64;
        let seconds = begun.elapsed().as_secs_f64();
        let ledger = &self.0.ledger;
        ledger.batch(answers.len() as u64, cached, failures, seconds);
        answers
    }

    fn known<T: DeserializeOwned>(&self, key: &str) -> Option<T> {
        match self.0.cache.as_ref()?.read(key) {
            Found::Answer(answer) => Some(answer),
            Found::Nothing => None,
            Found::Damaged(why) => {
                let line = format!(
                    "judge `{}`: a cached answer is not used: {why}",
                    self.0.name
                );
                self.0.notes.say("damaged", line);
                None
            }
        }
    }

    fn keep<T: Serialize>(&self, key: &str, answer: &T) {
        let Some(cache) = &self.0.cache else { return };
        if let Err(error) = cache.write(key, answer) {
            let line = format!("judge `{}`: answers cannot be kept: {error}", self.0.name);
            self.0.notes.say("unwritten", line);
        }
    }

    fn tell_failures<T>(&self, plugin: &str, answers: &[Result<T, JudgeError>]) {
        let failed = answers.iter().filter(|answer| answer.is_err()).count();
        let first = answers.iter().find_map(|answer| answer.as_ref().err());
        let Some(error) = first else { return };
        let kind = std::mem::discriminant(error);
        let (name, asked) = (&self.0.name, answers.len());
        let line = format!(
            "plugin `{plugin}` has no answer of judge `{name}` to {failed} of {asked} questions: {error}"
        );
        self.0.notes.say(&format!("{plugin} {kind:?}"), line);
    }
}

impl Workers {
    /// Asks all calls side by side and tells of each answer as it comes. `calls` come with the places of their values.
    fn ask<T: Send + 'static>(
        &self,
        endpoint: &Arc<Endpoint>,
        calls: impl Iterator<Item = (Call<T>, Vec<usize>)>,
        deadline: Instant,
        tell: Tell<'_, T>,
    ) {
        // Taken out only when the last judge goes.
        let Some(runtime) = &self.0 else { return };
        let mut asked = JoinSet::new();
        for (call, places) in calls {
            let endpoint = Arc::clone(endpoint);
            let ask = async move { (endpoint.ask(&call, deadline).await, places) };
            asked.spawn_on(ask, runtime.handle());
        }
        runtime.block_on(async {
            while let Some(ended) = asked.join_next().await {
                // Only a panic ends a task otherwise; its questions stay without an answer.
                let Ok((answers, places)) = ended else {
                    continue;
                };
                match answers {
                    Ok(values) => {
                        let values = places.into_iter().zip(values);
                        values.for_each(|(place, value)| tell(place, Ok(value)));
                    }
                    Err(error) => {
                        let places = places.into_iter();
                        places.for_each(|place| tell(place, Err(error.clone())));
                    }
                }
            }
        });
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        // A name that is being looked up cannot be called off, and nobody waits for it any more.
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

impl Notes {
    /// Keeps a line, unless there was one of its kind.
    fn say(&self, kind: &str, line: String) {
        let mut notes = lock(&self.0);
        if notes.0.insert(kind.to_owned()) {
            notes.1.push(line);
        }
    }

    fn take(&self) -> Vec<String> {
        std::mem::take(&mut lock(&self.0).1)
    }
}

/// What is behind these locks is whole after a panic too.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn refuse_empty(request: &Request<'_>) -> Result<(), JudgeError> {
    let why = match request {
        Request { messages: [], .. } => "a request without messages",
        Request { max_tokens: 0, .. } => "a request for an answer of 0 tokens",
        _ => return Ok(()),
    };
    Err(JudgeError::Refused(why.to_owned()))
}

/// Vectors of another length than the first one's are another model's.
fn refuse_other_lengths(vectors: &mut [Result<Vec<f32>, JudgeError>]) {
    let first = vectors.iter().flatten().map(Vec::len).next();
    for vector in vectors {
        if let (Ok(found), Some(length)) = (&vector, first)
            && found.len() != length
        {
            let why = format!("a vector of {} numbers among some of {length}", found.len());
            *vector = Err(JudgeError::Unavailable(why));
        }
    }
}
