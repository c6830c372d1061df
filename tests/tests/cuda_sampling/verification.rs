//! Proposals of one to eight tokens, certain and with probabilities on the GPU and on the host, verified by the kernels and
//! by the CPU's code.

use grpo_policy::{
    backend::{Backend, Exit, Sampled, StepRow, cuda::CudaBackend},
    engine::sampler::{Distribution, Proposal},
    spec::Family,
    types::SamplingParams,
};

use crate::{
    Agreement, args, backend,
    cuda_models::{spec, weights},
    params,
};

/// Sequences of eight tokens in the cache, and proposals of one to eight tokens behind most of them.
struct Verification {
    blocks: Vec<Vec<u32>>,
    tokens: Vec<Vec<u32>>,
    proposals: Vec<Proposal>,
    params: Vec<SamplingParams>,
}

const CACHED: usize = 8;

impl Verification {
    /// Drafted by the model itself at its own temperature, or by nobody (`certain`).
    fn new(gpu: &mut CudaBackend, rows: usize, certain: bool) -> Self {
        let vocab = gpu.spec().vocab_size as u32;
        let text = |s: usize| -> Vec<u32> {
            let of = |i: usize| ((s * 131 + i * 7919) % 1000) as u32 % vocab;
            (0..=CACHED).map(of).collect()
        };
        let mut all = Self {
            blocks: (0..rows as u32).map(|b| vec![2 * b, 2 * b + 1]).collect(),
            tokens: (0..rows).map(text).collect(),
            proposals: vec![Proposal::default(); rows],
            params: params(),
        };
        let sharper = SamplingParams {
            temperature: 0.8,
            top_k: 40,
            ..SamplingParams::default()
        };
        // The texts before go into the cache with the first round.
        for round in 0..8 {
            let from = if round == 0 { 0 } else { CACHED + round };
            let row = |s: usize| StepRow {
                sequence: s as u64,
                tokens: &all.tokens[s][from..],
                position: from,
                blocks: &all.blocks[s],
                sample: Some(args(&sharper, s as u64, CACHED + 1 + round, None, 0)),
            };
            let step: Vec<StepRow<'_>> = (0..rows).map(row).collect();
            let drafted = gpu.propose(&step, Exit::Final).unwrap();
            for (s, drafted) in drafted.into_iter().enumerate() {
                all.tokens[s].push(drafted.token);
                let proposal = &mut all.proposals[s];
                if proposal.tokens.len() < s % 9 {
                    proposal.tokens.push(drafted.token);
                    // Every third on the host, as from a draft elsewhere.
                    let q = match s % 3 {
                        0 => Distribution::Host(drafted.distribution.dense().unwrap().into_owned()),
                        _ => drafted.distribution,
                    };
                    proposal.probabilities.extend((!certain).then_some(q));
                }
            }
        }
        for (s, tokens) in all.tokens.iter_mut().enumerate() {
            tokens.truncate(CACHED + 1 + s % 9);
        }
        all
    }

    /// `beside`: a row that keeps the graph away, so that device and host see the same logits.
    fn run(
        &self,
        gpu: &mut CudaBackend,
        round: u64,
        top: usize,
        beside: bool,
    ) -> Vec<Vec<Sampled>> {
        let row = |s: usize| {
            let proposal = (!s.is_multiple_of(9)).then_some(&self.proposals[s]);
            let params = &self.params[s % self.params.len()];
            let stream = round * 1000 + s as u64;
            StepRow {
                sequence: s as u64,
                tokens: &self.tokens[s][CACHED..],
                position: CACHED,
                blocks: &self.blocks[s],
                sample: Some(args(params, stream, CACHED + 1, proposal, top)),
            }
        };
        let mut rows: Vec<StepRow<'_>> = (0..self.tokens.len()).map(row).collect();
        let last = [200];
        if beside {
            rows.push(StepRow {
                sequence: u64::MAX,
                tokens: &[1, 2],
                position: 0,
                blocks: &last,
                sample: None,
            });
        }
        let mut out = gpu.step(&rows).unwrap();
        out.truncate(self.tokens.len());
        out
    }
}

#[test]
#[ignore = "needs a GPU"]
fn verification_is_that_of_the_cpu() {
    for (vocab, rows, rounds) in [(17, 63, 12), (1009, 63, 12), (40_013, 45, 4)] {
        let spec = spec(Family::Qwen2, (14, 2, 64), vocab);
        let mut gpu = backend(&spec, &weights(&spec, 9));
        for certain in [true, false] {
            let work = Verification::new(&mut gpu, rows, certain);
            let (mut agreement, mut graph) = (Agreement::default(), (0, 0));
            let (mut proposed, mut accepted) = (0, 0);
            for round in 0..rounds {
                let device = work.run(&mut gpu, round, 0, true);
                let host = work.run(&mut gpu, round, 1, true);
                let captured = work.run(&mut gpu, round, 0, false);
                for (s, (d, h)) in device.iter().zip(&host).enumerate() {
                    agreement.add(d, h);
                    proposed += s % 9;
                    accepted += d.len() - 1;
                    let ids = |all: &[Sampled]| all.iter().map(|s| s.token).collect::<Vec<_>>();
                    graph.0 += 1;
                    graph.1 += usize::from(ids(d) != ids(&captured[s]));
                }
            }
            println!(
                "vocabulary {vocab}, certain {certain}: {accepted} of {proposed} accepted, the graph differs in {} of {}",
                graph.1, graph.0
            );
            agreement.check(&format!("vocabulary {vocab}, certain {certain}"), 200);
            // Its products run in another order, so logits differ by what bf16 leaves out.
            assert!(graph.1 * 10 <= graph.0, "{} of {}", graph.1, graph.0);
            assert!(accepted * 200 > proposed && accepted < proposed);
        }
    }
}
