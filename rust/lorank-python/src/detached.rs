//! Execution of heavy work: without the GIL, interruptible by Ctrl-C, with panics as exceptions.

use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread;
use std::time::{Duration, Instant};

use lorank::cancel::CancelToken;
use lorank::panics::guarded;
use lorank::parallel::check_stacks;
use lorank::{Error, Result};
use pyo3::prelude::*;

use crate::errors::to_py;
use crate::reserve;

/// Longest delay of results and of Ctrl-C. Waking up for every small result would take a processor from the
/// workers. The end of the work is reported without delay.
const PAUSE: Duration = Duration::from_millis(10);

/// Longest wait for the end of cancelled work.
const GRACE: Duration = Duration::from_millis(500);

/// A message from the worker to the waiting Python thread.
enum Message<M, T> {
    Item(M),
    Done(Result<T>),
}

/// A channel for items that Python code receives while the work continues.
pub struct Outbox<'a, M>(&'a (dyn Fn(M) + Sync));

impl<M> Outbox<'_, M> {
    /// Sends an item without blocking. Items are dropped after the caller has left.
    pub fn send(&self, item: M) {
        (self.0)(item);
    }
}

/// Runs `work` on a new thread and waits without the GIL. Calls `on_item` with every item that the work
/// sends. If a signal handler or `on_item` raises an exception, the work is cancelled. The call then waits
/// until the work has ended, so that it leaves no temporary files and takes no processor any more, but no
/// longer than [`GRACE`]. The work owns its input, so that a library call that cannot be interrupted may
/// finish later.
pub fn detached<T, M>(
    py: Python<'_>,
    work: impl FnOnce(&CancelToken, &Outbox<'_, M>) -> Result<T> + Send + 'static,
    mut on_item: impl FnMut(Python<'_>, M) -> PyResult<()>,
) -> PyResult<T>
where
    T: Send + 'static,
    M: Send + 'static,
{
    reserve::hold().and_then(|()| check_stacks(1)).map_err(to_py)?;
    let cancel = CancelToken::default();
    let (sender, receiver) = channel::<Message<M, T>>();
    let worker = {
        let (cancel, waiting) = (cancel.clone(), thread::current());
        move || {
            let outcome = guarded(|| {
                let send: &(dyn Fn(M) + Sync) = &|item| ignore_hangup(&sender, Message::Item(item));
                work(&cancel, &Outbox(send))
            });
            ignore_hangup(&sender, Message::Done(outcome));
            waiting.unpark();
        }
    };
    let thread = thread::Builder::new()
        .name("lorank".into())
        .spawn(worker)
        .map_err(|e| to_py(Error::NoThreads { threads: 1, source: e.into() }))?;

    loop {
        let step = match receiver.try_recv() {
            Ok(Message::Done(outcome)) => {
                reserve::make_room();
                if outcome.is_err() {
                    // The memory of the thread is free for the next call.
                    let _ = py.detach(|| thread.join());
                }
                return outcome.map_err(to_py);
            }
            Ok(Message::Item(item)) => {
                reserve::make_room();
                on_item(py, item)
            }
            Err(TryRecvError::Empty) => {
                py.detach(|| thread::park_timeout(PAUSE));
                reserve::lacking().map_or(Ok(()), |error| Err(to_py(error)))
            }
            Err(TryRecvError::Disconnected) => {
                Err(to_py(Error::Internal("the worker thread ended without a result".into())))
            }
        };
        if let Err(error) = step.and_then(|()| py.check_signals()) {
            cancel.cancel();
            py.detach(move || await_end(&receiver));
            return Err(error);
        }
    }
}

/// Waits until the worker has ended, or [`GRACE`] has passed.
fn await_end<M, T>(receiver: &Receiver<Message<M, T>>) {
    let end = Instant::now() + GRACE;
    // The worker's sender is dropped with its last data.
    while receiver.recv_timeout(end.saturating_duration_since(Instant::now())).is_ok() {}
}

/// Runs work of less than some milliseconds on the calling thread, with the GIL: a thread would take longer to
/// start.
pub fn brief<T>(work: impl FnOnce(&CancelToken) -> Result<T>) -> PyResult<T> {
    guarded(|| work(&CancelToken::default())).map_err(to_py)
}

/// Runs work that sends no items: see [`detached`].
pub fn detached_quiet<T: Send + 'static>(
    py: Python<'_>,
    work: impl FnOnce(&CancelToken) -> Result<T> + Send + 'static,
) -> PyResult<T> {
    detached(py, move |cancel, _: &Outbox<'_, ()>| work(cancel), |_, ()| Ok(()))
}

/// Calls `on_result(index, outcome)`. The outcome is the converted result, or the exception for its error.
/// Cancelled work is not reported.
pub fn hand_over<'py, T>(
    py: Python<'py>,
    on_result: &Bound<'py, PyAny>,
    index: usize,
    result: Result<T>,
    convert: impl FnOnce(T) -> PyResult<Bound<'py, PyAny>>,
) -> PyResult<()> {
    let outcome = match result {
        Ok(found) => convert(found)?,
        Err(Error::Cancelled) => return Ok(()),
        Err(error) => to_py(error).into_value(py).into_bound(py).into_any(),
    };
    on_result.call1((index, outcome)).map(drop)
}

fn ignore_hangup<M>(sender: &Sender<M>, message: M) {
    // The receiver is dropped after an interruption: the message has no recipient.
    let _ = sender.send(message);
}
