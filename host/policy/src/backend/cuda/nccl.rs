//! NCCL: sums over the GPUs of one host, and a way out for those who wait for a GPU that failed.
//!
//! The library is opened by its name as it is installed, `libnccl.so.2`; cudarc's loader looks for names that neither PyPI's
//! package nor a distribution's has without its headers.

use std::{
    ffi::{CStr, c_char, c_int, c_void},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use cudarc::driver::CudaStream;
use libloading::Library;

use super::CudaError;
use crate::error::PolicyError;

/// `ncclComm_t`.
type Comm = *mut c_void;
/// `ncclResult_t`.
type Status = c_int;

/// `ncclSuccess`, `ncclFloat32`, `ncclSum` (nccl.h).
const SUCCESS: Status = 0;
const FLOAT32: c_int = 7;
const SUM: c_int = 0;

/// The names it is installed under.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];

/// The functions of the library that are called here, with the types of nccl.h.
struct Functions {
    init_all: unsafe extern "C" fn(*mut Comm, c_int, *const c_int) -> Status,
    all_reduce: unsafe extern "C" fn(
        *const c_void,
        *mut c_void,
        usize,
        c_int,
        c_int,
        Comm,
        *mut c_void,
    ) -> Status,
    abort: unsafe extern "C" fn(Comm) -> Status,
    group_start: unsafe extern "C" fn() -> Status,
    group_end: unsafe extern "C" fn() -> Status,
    error_string: unsafe extern "C" fn(Status) -> *const c_char,
    /// Owns what the others point to.
    _library: Library,
}

/// Whether the library is installed.
pub fn has_nccl() -> bool {
    // SAFETY: opens and closes a shared library whose initialisers only set up its own state.
    NAMES
        .iter()
        .any(|name| unsafe { Library::new(*name) }.is_ok())
}

impl Functions {
    fn load() -> Result<Self, CudaError> {
        const MISSING: CudaError = CudaError::Library("nccl");
        let open = |name: &&str| {
            // SAFETY: its initialisers only set up the library's own state.
            unsafe { Library::new(*name) }.ok()
        };
        let library = NAMES.iter().find_map(open).ok_or(MISSING)?;
        // SAFETY: each type is that of nccl.h, which is the same in all of NCCL 2; the library lives as long as they.
        unsafe {
            macro_rules! function {
                ($name:literal) => {
                    *library.get($name).map_err(|_no_such_symbol| MISSING)?
                };
            }
            Ok(Self {
                init_all: function!(b"ncclCommInitAll\0"),
                all_reduce: function!(b"ncclAllReduce\0"),
                abort: function!(b"ncclCommAbort\0"),
                group_start: function!(b"ncclGroupStart\0"),
                group_end: function!(b"ncclGroupEnd\0"),
                error_string: function!(b"ncclGetErrorString\0"),
                _library: library,
            })
        }
    }

    fn check(&self, status: Status) -> Result<(), CudaError> {
        if status == SUCCESS {
            return Ok(());
        }
        // SAFETY: returns a string that the library owns for every status, also for those that it does not know.
        let text = unsafe { CStr::from_ptr((self.error_string)(status)) };
        Err(CudaError::Nccl(text.to_string_lossy().into_owned()))
    }
}

/// A communicator; null once it was aborted.
struct Handle(Comm);

// SAFETY: a communicator belongs to no thread; each is behind a mutex, so that one thread at a time calls with it.
unsafe impl Send for Handle {}

/// The communicators of all ranks, one GPU each.
pub(crate) struct Communicators {
    nccl: Functions,
    ranks: Vec<Mutex<Handle>>,
    aborted: AtomicBool,
}

impl Communicators {
    /// Rank `i` is GPU `ordinals[i]`.
    ///
    /// # Errors
    /// [`CudaError::Library`] without NCCL; what it says.
    pub(super) fn new(ordinals: &[usize]) -> Result<Self, CudaError> {
        let nccl = Functions::load()?;
        let devices: Vec<c_int> = ordinals.iter().map(|ordinal| *ordinal as c_int).collect();
        let mut comms = vec![std::ptr::null_mut(); devices.len()];
        // SAFETY: both lists have as many entries as it is told.
        let status = unsafe {
            (nccl.init_all)(comms.as_mut_ptr(), devices.len() as c_int, devices.as_ptr())
        };
        nccl.check(status)?;
        Ok(Self {
            nccl,
            ranks: comms.into_iter().map(|c| Mutex::new(Handle(c))).collect(),
            aborted: AtomicBool::new(false),
        })
    }

    /// Queues the sum over all ranks of `len` f32 at `at`, in place. All ranks queue the same sums in the same order.
    ///
    /// # Errors
    /// [`PolicyError::RankFailed`] after [`Self::abort`]; what NCCL says.
    pub(super) fn all_reduce(
        &self,
        rank: usize,
        (at, len): (u64, usize),
        stream: &CudaStream,
    ) -> Result<(), PolicyError> {
        let comm = self.lock(rank);
        if comm.0.is_null() {
            return Err(PolicyError::RankFailed);
        }
        let at = at as *mut c_void;
        // SAFETY: the caller names a live buffer of `len` f32 on this rank's GPU, and a stream there; the communicator is whole,
        // which the lock keeps so.
        let status = unsafe {
            let stream = stream.cu_stream().cast();
            (self.nccl.all_reduce)(at, at, len, FLOAT32, SUM, comm.0, stream)
        };
        Ok(self.nccl.check(status)?)
    }

    /// The first sums of all ranks, by one thread: NCCL connects the GPUs when it first sums so much, and waits for all of them in
    /// the call itself, where nobody could end the wait.
    ///
    /// # Errors
    /// What NCCL says.
    pub(super) fn connect(&self, sums: &[(u64, usize, &CudaStream)]) -> Result<(), PolicyError> {
        // SAFETY: opens a group of calls, which is closed below whatever happens between.
        self.nccl.check(unsafe { (self.nccl.group_start)() })?;
        let queued = sums
            .iter()
            .enumerate()
            .try_for_each(|(rank, (at, len, stream))| self.all_reduce(rank, (*at, *len), stream));
        // SAFETY: closes the group.
        let ended = unsafe { (self.nccl.group_end)() };
        queued?;
        Ok(self.nccl.check(ended)?)
    }

    /// Ends every sum that is under way, whose result is then undefined, and refuses all later ones.
    pub(crate) fn abort(&self) {
        self.aborted.store(true, Ordering::SeqCst);
        for rank in 0..self.ranks.len() {
            let comm = std::mem::replace(&mut self.lock(rank).0, std::ptr::null_mut());
            if !comm.is_null() {
                // SAFETY: the communicator is whole, and from now on nobody has it.
                _ = unsafe { (self.nccl.abort)(comm) };
            }
        }
    }

    /// # Errors
    /// [`PolicyError::RankFailed`] after [`Self::abort`].
    pub(super) fn check(&self) -> Result<(), PolicyError> {
        match self.aborted.load(Ordering::SeqCst) {
            true => Err(PolicyError::RankFailed),
            false => Ok(()),
        }
    }

    /// A panic while it was held leaves the pointer as it was.
    fn lock(&self, rank: usize) -> MutexGuard<'_, Handle> {
        let locked = self.ranks[rank].lock();
        locked.unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Communicators {
    fn drop(&mut self) {
        self.abort();
    }
}
