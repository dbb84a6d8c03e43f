//! The one way into heavy work: without the GIL, with Ctrl-C, without panics.

use std::sync::mpsc::{Sender, TryRecvError, channel};
use std::thread;
use std::time::Duration;

use lorank::cancel::CancelToken;
use lorank::panics::guarded;
use lorank::{Error, Result};
use pyo3::prelude::*;

use crate::errors::to_py;

/// How long results, and a Ctrl-C, can stay unnoticed: to wake up for every small one would take a processor from
/// the threads that work on the next. The end of the work is noticed at once.
const PAUSE: Duration = Duration::from_millis(10);

/// From the worker to the waiting Python thread.
enum Message<M, T> {
    Item(M),
    Done(Result<T>),
}

/// Where the work sends items that Python code should see while it goes on.
pub struct Outbox<'a, M>(&'a (dyn Fn(M) + Sync));

impl<M> Outbox<'_, M> {
    /// Never blocks; what is sent after the caller has left is dropped.
    pub fn send(&self, item: M) {
        (self.0)(item);
    }
}

/// Runs `work` on a thread of its own and waits without the GIL, handing every item that the work
/// sends to `on_item`. At a signal, or when `on_item` raises, the work is told to stop and is left
/// behind: it owns its input, so a library call that cannot be interrupted just finishes alone.
pub fn detached<T, M>(
    py: Python<'_>,
    work: impl FnOnce(&CancelToken, &Outbox<'_, M>) -> Result<T> + Send + 'static,
    mut on_item: impl FnMut(Python<'_>, M) -> PyResult<()>,
) -> PyResult<T>
where
    T: Send + 'static,
    M: Send + 'static,
{
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
    thread::Builder::new()
        .name("lorank".into())
        .spawn(worker)
        .map_err(|e| to_py(Error::NoThreads { threads: 1, source: e.into() }))?;

    loop {
        let step = match receiver.try_recv() {
            Ok(Message::Done(outcome)) => return outcome.map_err(to_py),
            Ok(Message::Item(item)) => on_item(py, item),
            Err(TryRecvError::Empty) => {
                py.detach(|| thread::park_timeout(PAUSE));
                Ok(())
            }
            Err(TryRecvError::Disconnected) => Err(to_py(Error::Internal("the worker is lost".into()))),
        };
        if let Err(error) = step.and_then(|()| py.check_signals()) {
            cancel.cancel();
            return Err(error);
        }
    }
}

/// [`detached`] for work that sends nothing on its way.
pub fn detached_quiet<T: Send + 'static>(
    py: Python<'_>,
    work: impl FnOnce(&CancelToken) -> Result<T> + Send + 'static,
) -> PyResult<T> {
    detached(py, move |cancel, _: &Outbox<'_, ()>| work(cancel), |_, ()| Ok(()))
}

/// Calls `on_result(index, outcome)` with what `convert` makes of a result, or with the exception of
/// its error; nothing is said of work that was cancelled.
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
    // The receiver is gone once the caller was interrupted: nobody is left to tell.
    let _ = sender.send(message);
}
