//! Ctrl-C: the first one asks the run to stop after its step, the second ends the process.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

/// Whether the user asked to stop. Shared with the signal thread, hence the `Arc`.
#[derive(Clone, Debug, Default)]
pub struct Interrupt(Arc<AtomicBool>);

/// Exit code of a process ended by SIGINT, by convention of shells.
const EXIT_SIGINT: i32 = 130;

impl Interrupt {
    /// Listens for SIGINT and SIGTERM on a thread of its own from now on. `on_request` is called there
    /// when the first one comes.
    pub fn listen(on_request: impl Fn() + Send + 'static) -> std::io::Result<Self> {
        let interrupt = Self::default();
        let flag = interrupt.clone();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let mut terminate = {
            let _inside = runtime.enter();
            tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?
        };
        std::thread::Builder::new()
            .name("signals".to_owned())
            .spawn(move || {
                runtime.block_on(async {
                    loop {
                        tokio::select! {
                            heard = tokio::signal::ctrl_c() => if heard.is_err() { return },
                            _ = terminate.recv() => {}
                        }
                        if flag.0.swap(true, Ordering::Relaxed) {
                            std::process::exit(EXIT_SIGINT);
                        }
                        on_request();
                    }
                });
            })?;
        Ok(interrupt)
    }

    /// True once the user asked to stop.
    pub fn requested(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}
