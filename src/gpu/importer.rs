//! When the process that has opened a slab's memory has no use for it any more.
//!
//! It holds the write end of a pipe, and puts a byte into it when it has closed the memory. A
//! hang-up without the byte is a process that dies: its files are closed before its work on the GPU
//! is over, so that its end is waited for.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::pipe::PipeFlags;

/// How long a process takes to end after its files were closed.
const DYING_MAX: Timespec = Timespec { tv_sec: 5, tv_nsec: 0 };

/// The daemon's view of that process.
pub struct Importer {
    closed: OwnedFd,
    /// A forked child may hold the pipe, too. Unknown where the system has no pidfd.
    process: Option<Arc<OwnedFd>>,
}

/// What that process is to be given. Dropped without that, it says that the memory is closed.
pub struct ImporterEnd {
    pipe: OwnedFd,
    is_given: bool,
}

impl Importer {
    /// For `process`, a pidfd.
    ///
    /// # Errors
    /// No file descriptors left.
    pub fn new(process: Option<Arc<OwnedFd>>) -> Result<(Self, ImporterEnd), Errno> {
        let (closed, pipe) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
        Ok((Self { closed, process }, ImporterEnd { pipe, is_given: false }))
    }

    /// Waits until it has closed the memory, or is dead.
    pub(super) fn wait(&self) {
        let pipe = PollFd::new(&self.closed, PollFlags::IN);
        let process = self.process.as_deref();
        let process = process.map(|process| PollFd::new(process, PollFlags::IN));
        let wait = |mut fds: Vec<PollFd<'_>>, at_most: Option<&Timespec>| {
            while poll(&mut fds, at_most) == Err(Errno::INTR) {}
            fds[0].revents()
        };
        let seen = wait(std::iter::once(pipe).chain(process.clone()).collect(), None);
        let is_dying = seen.contains(PollFlags::HUP) && !seen.contains(PollFlags::IN);
        if let Some(process) = process.filter(|_| is_dying) {
            wait(vec![process], Some(&DYING_MAX));
        }
    }
}

impl ImporterEnd {
    /// It is in that process's hands now.
    pub fn is_given(&mut self) {
        self.is_given = true;
    }
}

impl AsFd for ImporterEnd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }
}

impl Drop for ImporterEnd {
    fn drop(&mut self) {
        if !self.is_given {
            // There is room for it, and a reader as long as it is of interest.
            let _ = rustix::io::write(&self.pipe, b"\0");
        }
    }
}
