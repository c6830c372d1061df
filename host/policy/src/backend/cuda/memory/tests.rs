//! The arithmetic of the memory's plan, by hand.

use super::*;

const MIB: usize = 1 << 20;

/// A GPU of 10000 MiB, on which others use 1000 and this process 2000.
const MEMORY: Memory = Memory {
    total: 10_000 * MIB,
    free_at_start: 9_000 * MIB,
    free: 7_000 * MIB,
    utilization: 0.8,
};

/// Blocks of 1 MiB.
const NEEDS: PoolNeeds = PoolNeeds {
    policy: Tenant {
        token_bytes: MIB / BLOCK_SIZE,
        activations: 0,
    },
    draft: Tenant {
        token_bytes: 0,
        activations: 0,
    },
    blocks: 5_000,
    longest: 100 * BLOCK_SIZE,
};

#[test]
fn the_pool_gets_what_is_left_of_the_share() {
    let plan = divide(&MEMORY, (1_500 * MIB, None, 7_300 * MIB), &NEEDS).unwrap();
    let mib = |mib: usize| mib * MIB;
    assert_eq!((plan.allowed, plan.weights), (mib(8_000), mib(1_500)));
    assert_eq!((plan.workspace, plan.draft), (mib(200), mib(300)));
    // No more than the run can use.
    assert_eq!((plan.kv_blocks, plan.kv), (5_000, mib(5_000)));
    assert_eq!((plan.kv_tokens, plan.free), (160_000, mib(2_000)));
    // 8000 − 2000 − the reserve of 256.
    let needs = PoolNeeds {
        blocks: 50_000,
        ..NEEDS
    };
    let plan = divide(&MEMORY, (mib(1_500), None, mib(7_000)), &needs).unwrap();
    assert_eq!((plan.kv_blocks, plan.free), (5_744, mib(7_000 - 5_744)));
    assert_eq!(
        plan.to_string(),
        ": weights 1500 MiB, workspace 500 MiB, KV 5744 MiB (5744 blocks, 183808 tokens), 1256 MiB \
         free of 10000 MiB"
    );
}

/// Qwen2.5-0.5B.
fn half_billion(tied: bool) -> ModelSpec {
    ModelSpec {
        family: crate::spec::Family::Qwen2,
        vocab_size: 151_936,
        hidden_size: 896,
        intermediate_size: 4864,
        num_hidden_layers: 24,
        num_attention_heads: 14,
        num_key_value_heads: 2,
        head_dim: 64,
        max_position_embeddings: 1024,
        rms_norm_eps: 1e-6,
        rope_theta: 1e6,
        rope_scaling: None,
        tie_word_embeddings: tied,
        qkv_bias: true,
        o_bias: false,
        qk_norm: false,
    }
}

#[test]
fn a_step_reads_the_weights_once_and_the_keys_of_every_sequence() {
    let none = BTreeMap::new();
    let read = |tied| WeightSizes::of(&half_billion(tied), CudaWeights::dense(&none), 1024).read;
    // 494,032,768 weights of two bytes, of which 71,552 in vectors take four.
    let weights = 2 * (494_032_768 + 71_552);
    assert_eq!(read(true), weights);
    // The head is read whole whether it is the embeddings or not, the embeddings are not.
    assert_eq!(read(false), weights);
    assert_eq!(
        super::super::kv_bytes_per_token(&half_billion(true)),
        12_288
    );
}

#[test]
fn the_workspace_grows_by_what_a_token_a_sequence_and_a_row_take() {
    let bytes = |max_step_tokens, max_batch, max_model_len| {
        let sizes = CudaSizes {
            max_step_tokens,
            max_batch,
            max_model_len,
        };
        workspace_bytes(&half_billion(true), &sizes, 132)
    };
    // x, h, qkv, q, attended, gate_up, act, delta, sums; temperature, ask and verdict.
    let activations = 3584 + 1792 + 2304 + 1792 + 1792 + 19_456 + 9728 + 1792 + 56;
    let token = bytes(8193, 256, 384) - bytes(8192, 256, 384);
    assert_eq!(token, activations + 4 + 40 + 12);
    // 16 steps of two kinds of draws, the plain ones' 297 chunks of 12 bytes, two tables of 12 blocks.
    let sequence = 16 * (20 + 16) + 297 * 12 + 2 * 4 * 12;
    assert_eq!(bytes(8192, 200, 384) - bytes(8192, 199, 384), sequence);
    // Beyond 256 a sequence has logits of its own, with a hidden state and chunks of 12 + 48 bytes.
    let row = 1792 + 4 * 151_936 + 297 * 60;
    assert_eq!(
        bytes(8192, 301, 384) - bytes(8192, 300, 384),
        sequence + row
    );
}

#[test]
fn activations_are_kept_while_they_leave_a_quarter() {
    let plan = |kept: Kept| TrainingPlan {
        state: 3_000,
        gradients: 1_000,
        activations: 2_000 - 150 * kept.recomputed(10),
        tokens: 64,
        recomputed_layers: kept.recomputed(10),
    };
    let (needed, never) = (Recompute::AsNeeded, Recompute::Layers(0));
    let chosen = |left, recompute| choose(left, plan, (10, recompute)).map(|(kept, _)| kept);
    assert_eq!(chosen(6_668, needed).unwrap(), Kept::ACTIVATIONS);
    // 1,850 of three quarters of 2,667; 800 of three quarters of 1,068; 500 of less than all of 500.
    assert_eq!(chosen(6_667, needed).unwrap(), Kept::AllBut(1));
    assert_eq!(chosen(5_068, needed).unwrap(), Kept::AllBut(8));
    assert_eq!(chosen(4_500, needed).unwrap(), Kept::AllBut(10));
    assert_eq!(chosen(6_000, never).unwrap(), Kept::ACTIVATIONS);
    let four = Recompute::Layers(4);
    assert_eq!(chosen(100_000, four).unwrap(), Kept::AllBut(4));
    for (left, recompute) in [(5_999, never), (5_399, four), (4_499, needed)] {
        let error = chosen(left, recompute).unwrap_err();
        assert!(
            error.hint().unwrap().contains("micro_batch_tokens"),
            "{error}"
        );
    }
}

#[test]
fn what_training_takes_is_not_workspace() {
    let training = TrainingPlan {
        state: 60 * MIB,
        gradients: 20 * MIB,
        activations: 40 * MIB,
        tokens: 4096,
        recomputed_layers: 12,
    };
    let of_policy = (1_500 * MIB, Some(training), 7_300 * MIB);
    let plan = divide(&MEMORY, of_policy, &NEEDS).unwrap();
    assert_eq!((plan.weights, plan.workspace), (1_500 * MIB, 120 * MIB));
    let text = plan.to_string();
    let expected = "optimizer 60 MiB, gradients 20 MiB, draft 300 MiB, 5000 MiB by turns for activations (40 MiB, 4096 \
                    tokens, 12 layers recomputed) and KV 5000 MiB";
    assert!(text.contains(expected), "{text}");
}

#[test]
fn keys_and_values_take_turns_with_activations() {
    let needs = |activations, blocks| PoolNeeds {
        policy: Tenant {
            activations: activations * MIB,
            ..NEEDS.policy
        },
        blocks,
        ..NEEDS
    };
    let divided = |needs: PoolNeeds| divide(&MEMORY, (0, None, 0), &needs);
    // 5744 MiB are left. Each has all of them, not a part.
    let plan = divided(needs(5_000, 50_000)).unwrap();
    assert_eq!((plan.kv_blocks, plan.arena), (5_744, 5_744 * MIB));
    let plan = divided(needs(5_000, 700)).unwrap();
    assert_eq!((plan.kv_blocks, plan.kv), (700, 700 * MIB));
    assert_eq!((plan.arena, plan.free), (5_000 * MIB, 2_000 * MIB));
    // A draft that trains has an arena of its own: 5000 for its passes, the rest for the policy's keys.
    let with_draft = |activations| PoolNeeds {
        draft: Tenant {
            token_bytes: MIB / BLOCK_SIZE / 4,
            activations: activations * MIB,
        },
        ..needs(0, 50_000)
    };
    assert_eq!(divided(with_draft(0)).unwrap().kv_blocks, 5_744 * 4 / 5);
    let plan = divided(with_draft(5_000)).unwrap();
    assert_eq!((plan.kv_blocks, plan.arena), (744, 5_744 * MIB));
    let error = divided(with_draft(5_745)).unwrap_err();
    assert!(
        error.hint().unwrap().contains("micro_batch_tokens"),
        "{error}"
    );
}

#[test]
fn others_on_the_gpu_and_the_share_bound_each_other() {
    let crowded = Memory {
        free_at_start: 3_000 * MIB,
        free: 1_000 * MIB,
        ..MEMORY
    };
    assert_eq!(crowded.allowed(), 3_000 * MIB);
    assert_eq!(crowded.left(), 744 * MIB);
    let modest = Memory {
        utilization: 0.21,
        ..MEMORY
    };
    assert_eq!(modest.left(), 0);
}

#[test]
fn a_sequence_without_room_is_refused_with_numbers() {
    let longest = 5_745 * BLOCK_SIZE;
    let needs = PoolNeeds {
        blocks: 50_000,
        longest,
        ..NEEDS
    };
    let error = divide(&MEMORY, (0, None, 0), &needs).unwrap_err();
    assert_eq!(
        error.to_string(),
        "one sequence of 183840 tokens needs 5745 MiB of KV cache and 5744 MiB are left on the GPU"
    );
    assert!(error.hint().unwrap().contains("max_completion_length"));
    let needs = PoolNeeds {
        longest: longest - BLOCK_SIZE,
        ..needs
    };
    assert!(divide(&MEMORY, (0, None, 0), &needs).is_ok());
    // Asked for with `kv_cache_tokens`: requests that do not fit are refused when they come.
    let few = PoolNeeds { blocks: 3, ..NEEDS };
    assert_eq!(divide(&MEMORY, (0, None, 0), &few).unwrap().kv_blocks, 3);
}

#[test]
fn a_model_without_room_is_refused_before_it_is_there() {
    assert_eq!(
        admit(&MEMORY, 5_000 * MIB, 700 * MIB).unwrap(),
        Left(44 * MIB)
    );
    let error = admit(&MEMORY, 5_000 * MIB, 745 * MIB).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the model needs 5745 MiB on the GPU (weights 5000 MiB, workspace 745 MiB) and 5744 MiB are left there"
    );
    assert!(error.hint().unwrap().contains("gpu_memory_utilization"));
}
