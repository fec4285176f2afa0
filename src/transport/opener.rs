//! Sessions for clients of this host that have said hello.
//!
//! Owns what such sessions share: the windows of broadcast groups, and the GPUs. Knows no socket.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::process::{Pid, Uid};
use tracing::warn;

use crate::gpu::{Gpus, ImporterEnd};

use super::gpu_slab;
use super::provider::StreamProvider;
use super::session::{Peer, Session};
use super::windows::Windows;
use super::wire::{ClientHello, Refusal};

/// A session, and the end of the pipe by which its client says that it has closed what it had on a
/// GPU.
pub(super) type Opened = Result<(Session, Option<ImporterEnd>), Refusal>;

/// Whom the kernel says is there.
#[derive(Clone, Debug)]
pub(super) struct LocalPeer {
    pub(super) pid: Pid,
    pub(super) uid: Uid,
    /// Its pidfd, where the system has such.
    pub(super) process: Option<Arc<OwnedFd>>,
}

/// See the module. Any thread may use it.
pub(super) struct Opener {
    provider: Arc<dyn StreamProvider>,
    gpus: Gpus,
    windows: Mutex<Windows>,
}

impl Opener {
    pub(super) fn new(provider: Arc<dyn StreamProvider>, gpus: Gpus) -> Self {
        Self { provider, gpus, windows: Mutex::default() }
    }

    /// Opens a session, with a slab on the GPU that is asked for, if that can be; then it may take
    /// seconds. Where batches cannot be finished there, the workers make them whole.
    ///
    /// # Errors
    /// The client is refused.
    pub(super) fn open(&self, hello: ClientHello, peer: &LocalPeer) -> Opened {
        let ClientHello { client, request, .. } = hello;
        let (pid, uid) = (peer.pid.as_raw_nonzero().get(), peer.uid.as_raw());
        let described = Peer { client, pid: Some(pid), uid: Some(uid) };
        let open = |has_gpu| {
            let stream = self.provider.open(&request, has_gpu)?;
            let mut session = Session::open(request.clone(), stream, described.clone())?;
            let mut windows = self.windows.lock().unwrap_or_else(PoisonError::into_inner);
            session.window = windows.window_of(&session);
            drop(windows);
            let pipe = gpu_slab::open(&self.gpus, &mut session, peer.process.as_ref())?;
            Ok::<_, Refusal>((session, pipe))
        };
        let (session, pipe) = open(gpu_slab::is_wanted(&request))?;
        if session.stream.finish.is_none() {
            return Ok((session, pipe));
        }
        if pipe.is_none() {
            warn!(reason = session.gpu_refused, "batches are augmented by the processors");
        } else if gpu_slab::pays(&session, &*self.provider)? {
            return Ok((session, pipe));
        }
        // Its memory there is not to be in the way of the next one's.
        drop((session, pipe));
        open(false)
    }
}
