//! Which device is taken, and how many blocks are made of its memory.

use super::*;

fn old() -> PolicyError {
    CudaError::OldDriver { version: 11_040 }.into()
}

#[test]
fn auto_takes_the_first_gpu_that_opens() {
    let opens_from = |first: usize| {
        move |ordinal: usize| match ordinal < first {
            true => Err(old()),
            false => Ok(ordinal),
        }
    };
    for (count, first, expected) in [(1, 0, 0), (4, 0, 0), (4, 2, 2)] {
        let chosen = first_usable(Ok(count), opens_from(first)).unwrap();
        assert!(
            matches!(chosen, Chosen::Gpu(found) if found == expected),
            "{chosen:?}"
        );
    }
    let chosen = first_usable(Ok(3), opens_from(3)).unwrap();
    let Chosen::Cpu(Some(reason)) = chosen else {
        panic!("{chosen:?}");
    };
    assert!(reason.to_string().contains("CUDA 11.4"), "{reason}");
    assert!(reason.hint().is_some());
}

#[test]
fn no_gpu_needs_no_word_and_a_broken_driver_does() {
    let never = |_| -> Result<(), PolicyError> { panic!("there is no GPU to open") };
    let none = first_usable(Ok(0), never).unwrap();
    assert!(matches!(none, Chosen::Cpu(None)), "{none:?}");
    let broken = first_usable(Err(CudaError::Library("cuda")), never).unwrap();
    assert!(matches!(broken, Chosen::Cpu(Some(_))), "{broken:?}");
}

#[test]
fn what_no_device_can_do_is_an_error() {
    let missing = |_| -> Result<(), PolicyError> {
        Err(PolicyError::MissingWeight {
            name: "x".to_owned(),
        })
    };
    assert!(first_usable(Ok(1), missing).is_err());
    let large = |_| -> Result<(), PolicyError> {
        let (what, asked, most) = ("sequences", 2000, 1024);
        Err(CudaError::Capacity { what, asked, most }.into())
    };
    let error = first_usable(Ok(1), large).unwrap_err();
    assert!(error.hint().unwrap().contains("max_batch_size"));
}

#[test]
fn blocks_are_what_the_run_can_use_and_no_more_than_configured() {
    let sizes = CudaSizes {
        max_step_tokens: 8192,
        max_batch: 10,
        max_model_len: 65,
    };
    assert_eq!(gpu_blocks(&sizes, None), 40);
    assert_eq!(gpu_blocks(&sizes, Some(33)), 2);
    assert_eq!(gpu_blocks(&sizes, Some(1 << 40)), 40);
}
