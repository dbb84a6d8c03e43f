//! Conversion of panics to errors: a defect in one piece of work does not end the process.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::{Error, Result};

/// Message and source position of the latest panic.
static LATEST: Mutex<Option<(String, String)>> = Mutex::new(None);

/// Runs `work` and converts a panic within it to an error.
///
/// # Errors
/// The errors of `work`, and [`Error::Internal`] for a panic.
pub fn guarded<R>(work: impl FnOnce() -> Result<R>) -> Result<R> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| Err(Error::Internal(description(&*panic))))
}

/// Installs a panic hook for the whole process. It adds the source position of a panic to the error of
/// [`guarded`], and prints no report to standard error unless `RUST_BACKTRACE` is set.
pub fn locate_panics() {
    let report = std::panic::take_hook();
    let reports = std::env::var_os("RUST_BACKTRACE").is_some_and(|value| value != "0");
    std::panic::set_hook(Box::new(move |panic| {
        *latest() = panic.location().map(|place| (panic_message(panic.payload()), place.to_string()));
        if reports {
            report(panic);
        }
    }));
}

/// Returns the message of a panic.
fn panic_message(panic: &(dyn Any + Send)) -> String {
    panic
        .downcast_ref::<&str>()
        .map(ToString::to_string)
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "unknown panic".into())
}

/// Returns the message on one line, followed by the source position if it is known.
fn description(panic: &(dyn Any + Send)) -> String {
    let message = panic_message(panic);
    // The panic is usually the latest one. If another thread has panicked since, the messages differ, and the
    // position is omitted.
    let place = latest().take_if(|(of, _)| *of == message).map(|(_, place)| format!(" at {place}"));
    let line: Vec<&str> = message.lines().map(str::trim).collect();
    line.join(", ") + &place.unwrap_or_default()
}

fn latest() -> MutexGuard<'static, Option<(String, String)>> {
    LATEST.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panics_become_errors_with_their_message() {
        for (panic, said) in [
            (catch_unwind(|| panic!("plain")), "plain"),
            (catch_unwind(|| panic!("formatted {}", 7)), "formatted 7"),
            (catch_unwind(|| std::panic::panic_any(7)), "unknown panic"),
        ] {
            let panic: Box<dyn Any + Send> = panic.map(|()| unreachable!()).unwrap_err();
            assert_eq!(panic_message(&*panic), said);
        }
        let error = guarded::<()>(|| panic!("lost")).unwrap_err();
        assert!(matches!(error, Error::Internal(_)));
        assert_eq!(error.to_string(), "internal error: lost");
    }

    #[test]
    fn a_message_of_several_lines_becomes_one_line() {
        let error = guarded::<()>(|| panic!("unequal\n  left: 1\n right: 2")).unwrap_err();
        assert_eq!(error.to_string(), "internal error: unequal, left: 1, right: 2");
    }

    #[test]
    fn only_the_position_of_the_same_message_is_added() {
        *latest() = Some(("the one".into(), "here.rs:1:2".into()));
        assert_eq!(description(&"another"), "another");
        assert_eq!(description(&"the one"), "the one at here.rs:1:2");
        assert_eq!(description(&"the one"), "the one");
    }
}
