//! How fast an endpoint is asked: so many requests and tokens in any 60 seconds, and nothing while it has asked to
//! be left alone.

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

const WINDOW: Duration = Duration::from_secs(60);

/// Admits requests one after the other, in the order in which they came.
pub(super) struct Rate {
    turn: tokio::sync::Mutex<()>,
    sent: Mutex<Sent>,
}

/// A request that was admitted, by its number.
pub(super) struct Ticket(u64);

/// What was sent within the last window.
struct Sent {
    requests: Option<u64>,
    tokens: Option<u64>,
    requests_sent: VecDeque<Entry>,
    next: u64,
    hold: Option<Instant>,
}

struct Entry {
    number: u64,
    at: Instant,
    tokens: u64,
}

impl Rate {
    /// Limits of a window; `None` is no limit.
    pub(super) fn new(requests: Option<u64>, tokens: Option<u64>) -> Self {
        Self {
            turn: tokio::sync::Mutex::default(),
            sent: Mutex::new(Sent {
                requests,
                tokens,
                requests_sent: VecDeque::new(),
                next: 0,
                hold: None,
            }),
        }
    }

    /// Waits for a place for a request of so many tokens. `None` at once, rather than at `deadline`, where there will be
    /// none before it.
    pub(super) async fn admit(&self, tokens: u64, deadline: Instant) -> Option<Ticket> {
        let _turn = self.turn.lock().await;
        loop {
            let admitted = self.lock().admit(Instant::now(), tokens);
            match admitted {
                Ok(ticket) => return Some(ticket),
                Err(free) if free >= deadline => return None,
                Err(free) => tokio::time::sleep_until(free.into()).await,
            }
        }
    }

    /// Corrects an estimate once the endpoint has said what a request was.
    pub(super) fn settle(&self, ticket: &Ticket, tokens: u64) {
        let mut sent = self.lock();
        let entry = sent.requests_sent.iter_mut().find(|e| e.number == ticket.0);
        if let Some(entry) = entry {
            entry.tokens = tokens;
        }
    }

    /// Admits nobody before `until`.
    pub(super) fn hold(&self, until: Instant) {
        let hold = &mut self.lock().hold;
        *hold = Some(hold.map_or(until, |before| before.max(until)));
    }

    fn lock(&self) -> MutexGuard<'_, Sent> {
        self.sent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Sent {
    /// Takes a place, or says when to look for one again.
    fn admit(&mut self, now: Instant, tokens: u64) -> Result<Ticket, Instant> {
        if let Some(until) = self.hold.filter(|until| *until > now) {
            return Err(until);
        }
        self.hold = None;
        let queue = &mut self.requests_sent;
        while queue.front().is_some_and(|e| e.at + WINDOW <= now) {
            queue.pop_front();
        }
        if let Some(limit) = self.requests
            && let Some(over) = (queue.len() as u64 + 1).checked_sub(limit)
            && over > 0
        {
            return Err(queue[over as usize - 1].at + WINDOW);
        }
        if let Some(limit) = self.tokens {
            // One that is larger than the whole window goes alone.
            let free = limit - tokens.min(limit);
            let mut used: u64 = queue.iter().map(|e| e.tokens).sum();
            for entry in queue.iter() {
                if used <= free {
                    break;
                }
                used -= entry.tokens;
                if used <= free {
                    return Err(entry.at + WINDOW);
                }
            }
        }
        let number = self.next;
        self.next += 1;
        if self.requests.is_some() || self.tokens.is_some() {
            queue.push_back(Entry {
                number,
                at: now,
                tokens,
            });
        }
        Ok(Ticket(number))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Seconds from `start` at which each request of so many tokens would go out if it waited as told.
    fn schedule(rate: &Rate, start: Instant, requests: &[u64]) -> Vec<u64> {
        let mut now = start;
        let admit = |tokens: &u64| {
            loop {
                match rate.lock().admit(now, *tokens) {
                    Ok(_) => return (now - start).as_secs(),
                    Err(free) => now = free,
                }
            }
        };
        requests.iter().map(admit).collect()
    }

    #[test]
    fn no_window_has_more_requests_than_allowed() {
        let rate = Rate::new(Some(2), None);
        let start = Instant::now();
        assert_eq!(schedule(&rate, start, &[1; 5]), [0, 0, 60, 60, 120]);
    }

    #[test]
    fn no_window_has_more_tokens_than_allowed() {
        let rate = Rate::new(None, Some(100));
        let start = Instant::now();
        let out = schedule(&rate, start, &[60, 40, 30, 70, 500, 1]);
        assert_eq!(out, [0, 0, 60, 60, 120, 180]);
    }

    #[test]
    fn an_estimate_is_corrected_and_an_endpoint_is_left_alone() {
        let rate = Rate::new(None, Some(100));
        let start = Instant::now();
        let ticket = rate.lock().admit(start, 90).ok().unwrap();
        assert_eq!(
            rate.lock().admit(start, 50).err(),
            Some(start + WINDOW),
            "there is no room yet"
        );
        rate.settle(&ticket, 10);
        assert!(rate.lock().admit(start, 50).is_ok());
        let until = start + Duration::from_secs(7);
        rate.hold(until);
        rate.hold(start);
        assert_eq!(rate.lock().admit(start, 1).err(), Some(until));
        assert!(rate.lock().admit(until, 1).is_ok());
    }
}
