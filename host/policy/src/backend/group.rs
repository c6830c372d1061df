//! Ranks: backends of one model, each on a device of its own, that sum their gradients over all before they update (data
//! parallelism). All then make the same update, so weights that were equal stay equal to the bit.
//!
//! Here is who sums with whom, and the sum in main memory; that of GPUs is NCCL's (`cuda/nccl.rs`).

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::{AnyBackend, cpu::CpuBackend, cuda};
use crate::error::PolicyError;

/// A way to end what ranks wait for. Each waits for all others in an update, so that one which cannot go on must say so.
#[derive(Clone)]
pub struct Group(Kind);

#[derive(Clone)]
enum Kind {
    Threads(Arc<Exchange>),
    Gpus(Arc<cuda::Communicators>),
}

impl Group {
    /// Has these backends, which train copies of one model, sum their gradients at every update from now on. Each is to be
    /// called by a thread of its own.
    ///
    /// # Errors
    /// [`PolicyError::Misuse`] for devices of two kinds; on GPUs as for [`cuda::CudaBackend::join`].
    pub fn join(ranks: &mut [&mut AnyBackend]) -> Result<Self, PolicyError> {
        const MIXED: PolicyError = PolicyError::Misuse("ranks are all on GPUs or all on the CPU");
        if let Some(AnyBackend::Cuda(_)) = ranks.first() {
            let gpus = ranks.iter_mut().map(|rank| match &mut **rank {
                AnyBackend::Cuda(gpu) => Ok(&mut **gpu),
                AnyBackend::Cpu(_) => Err(MIXED),
            });
            let mut gpus = gpus.collect::<Result<Vec<_>, _>>()?;
            let group = cuda::CudaBackend::join(&mut gpus)?;
            return Ok(Self(Kind::Gpus(group)));
        }
        let exchange = Arc::new(Exchange::new(ranks.len()));
        for (rank, backend) in ranks.iter_mut().enumerate() {
            match &mut **backend {
                AnyBackend::Cpu(cpu) => cpu.join(Seat {
                    exchange: exchange.clone(),
                    rank,
                }),
                AnyBackend::Cuda(_) => return Err(MIXED),
            }
        }
        Ok(Self(Kind::Threads(exchange)))
    }

    /// Has every sum that is waited for, and every later one, end with [`PolicyError::RankFailed`].
    pub fn abort(&self) {
        match &self.0 {
            Kind::Threads(exchange) => exchange.abort(),
            Kind::Gpus(group) => group.abort(),
        }
    }
}

/// A rank's place in an [`Exchange`].
pub(crate) struct Seat {
    exchange: Arc<Exchange>,
    rank: usize,
}

impl Seat {
    /// The sum over all ranks of what each gives, the same for all of them to the bit.
    ///
    /// # Errors
    /// [`PolicyError::RankFailed`] once a rank has given up.
    pub(crate) fn sum(&self, mine: Vec<f32>) -> Result<Arc<Vec<f32>>, PolicyError> {
        self.exchange.sum(self.rank, mine)
    }
}

/// Where threads meet to add up.
struct Exchange {
    round: Mutex<Round>,
    changed: Condvar,
}

struct Round {
    given: Vec<Option<Vec<f32>>>,
    /// Of the round before; whoever gives again has read it.
    sum: Arc<Vec<f32>>,
    number: u64,
    aborted: bool,
}

impl Exchange {
    fn new(ranks: usize) -> Self {
        Self {
            round: Mutex::new(Round {
                given: vec![None; ranks],
                sum: Arc::default(),
                number: 0,
                aborted: false,
            }),
            changed: Condvar::new(),
        }
    }

    fn sum(&self, rank: usize, mine: Vec<f32>) -> Result<Arc<Vec<f32>>, PolicyError> {
        let mut round = self.lock();
        let number = round.number;
        round.given[rank] = Some(mine);
        if round.given.iter().all(Option::is_some) {
            let mut given = round.given.iter_mut().filter_map(Option::take);
            let mut sum = given.next().unwrap_or_default();
            for other in given {
                sum.iter_mut().zip(&other).for_each(|(sum, x)| *sum += x);
            }
            round.sum = Arc::new(sum);
            round.number += 1;
            self.changed.notify_all();
        }
        while round.number == number && !round.aborted {
            let woken = self.changed.wait(round);
            round = woken.unwrap_or_else(PoisonError::into_inner);
        }
        match round.aborted {
            true => Err(PolicyError::RankFailed),
            false => Ok(round.sum.clone()),
        }
    }

    fn abort(&self) {
        self.lock().aborted = true;
        self.changed.notify_all();
    }

    /// Nothing is done under the lock that leaves it half changed.
    fn lock(&self) -> MutexGuard<'_, Round> {
        self.round.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl CpuBackend {
    fn join(&mut self, seat: Seat) {
        self.seat = Some(seat);
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn sums_of_several_rounds_are_the_same_for_all() {
        let exchange = Exchange::new(3);
        let of_rank = |rank: usize| {
            let give = |round: usize| vec![rank as f32, (10 * round + rank) as f32];
            let sums = (0..20).map(|round| exchange.sum(rank, give(round)).unwrap());
            sums.collect::<Vec<_>>()
        };
        let sums = thread::scope(|scope| {
            let others = [1, 2].map(|rank| scope.spawn(move || of_rank(rank)));
            let mut sums = vec![of_rank(0)];
            sums.extend(others.map(|other| other.join().unwrap()));
            sums
        });
        for round in 0..20 {
            for rank in &sums {
                assert_eq!(*rank[round], [3.0, (30 * round + 3) as f32]);
            }
        }
    }

    #[test]
    fn whoever_waits_for_a_rank_that_gives_up_is_told() {
        let exchange = Exchange::new(2);
        let failed = |sum| matches!(sum, Err(PolicyError::RankFailed));
        thread::scope(|scope| {
            let waiting = scope.spawn(|| exchange.sum(0, vec![1.0]));
            exchange.abort();
            assert!(failed(waiting.join().unwrap()));
        });
        assert!(failed(exchange.sum(0, vec![1.0])));
    }
}
