//! Version 0.1 of the WIT: the generated bindings and the host's side of its imports.
//!
//! The only `bindgen!` of the workspace. A made-up world that includes all three makes the roles
//! share one set of types; components are never instantiated through it.

use super::grants::{HttpError, HttpRequest};
use super::log::LogLevel;
use super::sandbox::CallState;
use crate::judge::{JudgeError, Request as JudgeRequest};
use crate::types::{Finish, Message};

mod bindings {
    wasmtime::component::bindgen!({
        path: "../wit/v0.1",
        inline: "
            package grpo:host;
            world every-role {
                include grpo:plugin/reward@0.1.0;
                include grpo:plugin/formatter@0.1.0;
                include grpo:plugin/curriculum@0.1.0;
            }
        ",
        world: "grpo:host/every-role",
        ownership: Borrowing { duplicate_if_necessary: true },
        imports: { default: trappable },
    });
}

pub(super) use bindings::EveryRole;
pub(super) use bindings::exports::grpo::plugin::{formatting, planning, scoring};
pub(super) use bindings::grpo::plugin::types as wit;
use bindings::grpo::plugin::{host, http, judge, secrets, types as wit_types};

impl wit_types::Host for CallState {}

impl host::Host for CallState {
    fn log(&mut self, level: host::Level, text: String) -> wasmtime::Result<()> {
        // A guest that lives in host calls rarely reaches an epoch check of its own.
        self.clock.check()?;
        let level = match level {
            host::Level::Debug => LogLevel::Debug,
            host::Level::Info => LogLevel::Info,
            host::Level::Warn => LogLevel::Warn,
            host::Level::Error => LogLevel::Error,
        };
        let waited = self.log.line(level, &text);
        self.clock.forgive(waited);
        Ok(())
    }

    fn sample_telemetry(&mut self) -> wasmtime::Result<Vec<wit::Telemetry>> {
        self.clock.check()?;
        Ok(self.telemetry.clone())
    }
}

impl judge::Host for CallState {
    fn complete(
        &mut self,
        requests: Vec<judge::Request>,
    ) -> wasmtime::Result<Vec<Result<judge::Reply, judge::JudgeError>>> {
        let Some(judge) = &self.reach.judge else {
            return Ok(vec![Err(judge_error(nobody())); requests.len()]);
        };
        let conversations: Vec<(Vec<Message>, u32)> =
            requests.into_iter().map(conversation).collect();
        let asked: Vec<JudgeRequest<'_>> = conversations
            .iter()
            .map(|(messages, max_tokens)| JudgeRequest {
                messages,
                max_tokens: *max_tokens,
            })
            .collect();
        let ask = |end| judge.complete(&self.plugin, &asked, end);
        let replies = self.clock.wait(ask)?;
        let reply = |reply: crate::judge::Reply| judge::Reply {
            text: reply.text,
            finish: match reply.finish {
                Finish::Stop => wit::Finish::Stop,
                Finish::Length => wit::Finish::Length,
                Finish::Abort => wit::Finish::Abort,
            },
            prompt_tokens: reply.prompt_tokens,
            completion_tokens: reply.completion_tokens,
        };
        let replies = replies
            .into_iter()
            .map(|r| r.map(reply).map_err(judge_error));
        Ok(replies.collect())
    }

    fn embed(
        &mut self,
        texts: Vec<String>,
    ) -> wasmtime::Result<Vec<Result<Vec<f32>, judge::JudgeError>>> {
        let Some(judge) = &self.reach.judge else {
            return Ok(vec![Err(judge_error(nobody())); texts.len()]);
        };
        let embed = |end| judge.embed(&self.plugin, &texts, end);
        let vectors = self.clock.wait(embed)?;
        Ok(vectors
            .into_iter()
            .map(|v| v.map_err(judge_error))
            .collect())
    }
}

/// Nothing links `judge` without the grant, so no guest meets this.
fn nobody() -> JudgeError {
    JudgeError::Unavailable("nothing was granted".to_owned())
}

fn conversation(request: judge::Request) -> (Vec<Message>, u32) {
    let message = |m: wit::Message| Message {
        role: m.role,
        content: m.content,
    };
    let messages = request.messages.into_iter().map(message).collect();
    (messages, request.max_tokens)
}

fn judge_error(error: JudgeError) -> judge::JudgeError {
    match error {
        JudgeError::Timeout => judge::JudgeError::Timeout,
        JudgeError::Exhausted(why) => judge::JudgeError::Exhausted(why),
        JudgeError::Refused(why) => judge::JudgeError::Refused(why),
        JudgeError::Unavailable(why) => judge::JudgeError::Unavailable(why),
    }
}

impl http::Host for CallState {
    fn send(
        &mut self,
        requests: Vec<http::Request>,
    ) -> wasmtime::Result<Vec<Result<http::Response, http::HttpError>>> {
        let request = |r: http::Request| HttpRequest {
            post: matches!(r.method, http::Method::Post),
            url: r.url,
            headers: r.headers,
            body: r.body,
        };
        let requests: Vec<HttpRequest> = requests.into_iter().map(request).collect();
        let responses = self.clock.wait(|end| self.reach.http(&requests, end))?;
        let response = |r: super::grants::HttpResponse| http::Response {
            status: r.status,
            headers: r.headers,
            body: r.body,
        };
        let error = |error| match error {
            HttpError::Denied(why) => http::HttpError::Denied(why),
            HttpError::Timeout => http::HttpError::Timeout,
            HttpError::TooLarge(why) => http::HttpError::TooLarge(why),
            HttpError::Failed(why) => http::HttpError::Failed(why),
        };
        let responses = responses
            .into_iter()
            .map(|r| r.map(response).map_err(error));
        Ok(responses.collect())
    }
}

impl secrets::Host for CallState {
    fn get(&mut self, name: String) -> wasmtime::Result<Option<String>> {
        self.clock.check()?;
        Ok(self.reach.secrets.get(&name).map(str::to_owned))
    }
}
