//! CUDA's driver API: the few calls that are needed, as types that clean up behind themselves. The
//! one place of this module with `unsafe`.
//!
//! *Justification*: CUDA is a C library. `cudarc` loads it and has its types; its own safe layer
//! knows neither interprocess handles nor another's context.
//!
//! *Invariant*: everything here belongs to one thread, that of its [`Context`], in which that
//! context is current as long as any of it lives. The types hold raw pointers, so that the compiler
//! keeps them there (`!Send`).
//!
//! *Source* of each call's contract: NVIDIA, CUDA Driver API, chapters 6.6 (primary contexts), 6.13
//! (memory, interprocess communication), 6.18 (streams), 6.19 (events).

use std::any::Any;
use std::ffi::{c_uint, c_void};
use std::marker::PhantomData;
use std::sync::Arc;

use cudarc::driver::result;
use cudarc::driver::sys;

use super::{GpuError, IpcHandle, Uuid, Where, uuid_text};

/// CUDA cuts smaller allocations out of blocks of this size, and exports only whole blocks: what is
/// rounded up to it shares its block with nobody.
const BLOCK_BYTES: usize = 2 << 20;
/// Page-locked for every context of the process.
const REGISTER_PORTABLE: c_uint = 1;

fn check(what: &'static str, result: sys::CUresult) -> Result<(), GpuError> {
    result.result().map_err(|error| refusal(what, error))
}

fn refusal(what: &'static str, error: result::DriverError) -> GpuError {
    let text = |found: Result<&std::ffi::CStr, _>| {
        found.map_or_else(|_| format!("{:?}", error.0), |text| text.to_string_lossy().into_owned())
    };
    let problem = format!("{} ({})", text(error.error_string()), text(error.error_name()));
    GpuError::Cuda { what, problem }
}

/// A GPU's primary context, the one that libtorch uses, too: current in the thread that made it.
/// CUDA counts who retains it, and destroys it behind the last one.
pub(super) struct Context {
    device: sys::CUdevice,
    ordinal: usize,
    /// Not to be sent to another thread.
    _thread: PhantomData<*const ()>,
}

impl Context {
    /// # Errors
    /// No driver, no such GPU, or CUDA cannot use it.
    #[allow(unsafe_code, reason = "see the module's Justification")]
    pub(super) fn open(uuid: Uuid) -> Result<Self, GpuError> {
        // SAFETY: loads libcuda.so.1, whose initialisers are made to be run in any process.
        if !unsafe { sys::is_culib_present() } {
            return Err(GpuError::NoDriver);
        }
        result::init().map_err(|error| refusal("cuInit", error))?;
        let count = result::device::get_count();
        let count = count.map_err(|error| refusal("cuDeviceGetCount", error))?;
        for ordinal in 0..count {
            let device = result::device::get(ordinal);
            let device = device.map_err(|error| refusal("cuDeviceGet", error))?;
            let mut found = sys::CUuuid { bytes: [0; 16] };
            // SAFETY: a device that CUDA has just given, and a place for its UUID.
            check("cuDeviceGetUuid", unsafe { sys::cuDeviceGetUuid_v2(&raw mut found, device) })?;
            if found.bytes.map(|byte| byte as u8) != uuid {
                continue;
            }
            // SAFETY: such a device; released once, in drop.
            let context = unsafe { result::primary_ctx::retain(device) };
            let context = context.map_err(|error| refusal("cuDevicePrimaryCtxRetain", error))?;
            let number = usize::try_from(ordinal).expect("counted from 0");
            let opened = Self { device, ordinal: number, _thread: PhantomData };
            // SAFETY: a context that is retained as long as `opened` lives.
            let set = unsafe { result::ctx::set_current(context) };
            set.map_err(|error| refusal("cuCtxSetCurrent", error))?;
            return Ok(opened);
        }
        Err(GpuError::NoSuchGpu(uuid_text(uuid)))
    }
}

impl Drop for Context {
    #[allow(unsafe_code, reason = "see the module's Justification")]
    fn drop(&mut self) {
        // SAFETY: retained once in `open`; by the module's invariant nothing of it is left.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}

impl Context {
    /// Whose memory that of [`Memory`] is: a played driver's is the host's.
    ///
    /// # Errors
    /// CUDA's.
    #[allow(unsafe_code, reason = "see the module's Justification")]
    pub(super) fn place_of(&self, memory: &Memory) -> Result<Where, GpuError> {
        let mut kind: c_uint = 0;
        let attribute = sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE;
        // SAFETY: a place for an unsigned int, which this attribute is, and a live allocation.
        let result = unsafe {
            sys::cuPointerGetAttribute((&raw mut kind).cast(), attribute, memory.address)
        };
        check("cuPointerGetAttribute", result)?;
        let is_host = kind == sys::CUmemorytype::CU_MEMORYTYPE_HOST as c_uint;
        Ok(if is_host { Where::Host } else { Where::Gpu(self.ordinal) })
    }
}

/// A queue of copies, which waits for no other stream of the process.
pub(super) struct Stream(sys::CUstream);

impl Stream {
    /// # Errors
    /// CUDA's.
    pub(super) fn new(_: &Context) -> Result<Self, GpuError> {
        let made = result::stream::create(result::stream::StreamKind::NonBlocking);
        made.map(Self).map_err(|error| refusal("cuStreamCreate", error))
    }

    /// Waits until it has nothing to do, after a failure.
    #[allow(unsafe_code, reason = "see the module's Justification")]
    pub(super) fn wait(&self) {
        // SAFETY: a live stream. What it says of the failure is known.
        let _ = unsafe { result::stream::synchronize(self.0) };
    }

    /// The same for the default one.
    #[allow(unsafe_code, reason = "see the module's Justification")]
    pub(super) fn wait_for_default(_: &Context) {
        // SAFETY: it is always there, in the context that is current.
        let _ = unsafe { result::stream::synchronize(result::stream::null()) };
    }
}

impl Drop for Stream {
    #[allow(unsafe_code, reason = "see the module's Justification")]
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed once. CUDA lets it finish what is queued.
        let _ = unsafe { result::stream::destroy(self.0) };
    }
}

/// Passes when the work before it in its stream is over; one that was never recorded has passed.
pub(super) struct Event(sys::CUevent);

impl Event {
    /// For this process alone.
    ///
    /// # Errors
    /// CUDA's.
    pub(super) fn new(_: &Context) -> Result<Self, GpuError> {
        Self::with(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
    }

    /// One that another process can record, and what it opens it by.
    ///
    /// # Errors
    /// CUDA's: where processes cannot share, such as MIG.
    #[allow(unsafe_code, reason = "see the module's Justification")]
    pub(super) fn exported(_: &Context) -> Result<(Self, IpcHandle), GpuError> {
        let flags = c_uint::from(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u8)
            | c_uint::from(sys::CUevent_flags::CU_EVENT_INTERPROCESS as u8);
        let mut event = std::ptr::null_mut();
        // SAFETY: a place for the event; the flags are what an exported event must have.
        check("cuEventCreate", unsafe { sys::cuEventCreate(&raw mut event, flags) })?;
        let event = Self(event);
        let mut handle = sys::CUipcEventHandle { reserved: [0; 64] };
        // SAFETY: a place for the handle, and a live event of the kind that can be exported.
        let result = unsafe { sys::cuIpcGetEventHandle(&raw mut handle, event.0) };
        check("cuIpcGetEventHandle", result)?;
        Ok((event, handle.reserved.map(|byte| byte as u8)))
    }

    fn with(flags: sys::CUevent_flags) -> Result<Self, GpuError> {
        result::event::create(flags).map(Self).map_err(|error| refusal("cuEventCreate", error))
    }

    /// Puts it behind everything that the stream has been given.
    ///
    /// # Errors
    /// CUDA's.
    #[allow(unsafe_code, reason = "see the module's Justification")]
    pub(super) fn record(&self, stream: &Stream) -> Result<(), GpuError> {
        // SAFETY: both are alive, and of the one context of this thread.
        let recorded = unsafe { result::event::record(self.0, stream.0) };
        recorded.map_err(|error| refusal("cuEventRecord", error))
    }

    /// The same for the default stream, where libtorch works.
    ///
    /// # Errors
    /// CUDA's.
    #[allow(unsafe_code, reason = "see the module's Justification")]
    pub(super) fn record_default(&self, _: &Context) -> Result<(), GpuError> {
        // SAFETY: a live event of this thread's context, whose default stream is always there.
        let recorded = unsafe { result::event::record(self.0, result::stream::null()) };
        recorded.map_err(|error| refusal("cuEventRecord", error))
    }

    /// Has the later work of the default stream wait until it has passed. Does not wait itself,
    /// and what is recorded later does not count.
    ///
    /// # Errors
    /// CUDA's.
    #[allow(unsafe_code, reason = "see the module's Justification")]
    pub(super) fn holds_default(&self, _: &Context) -> Result<(), GpuError> {
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: a live event of this thread's context, whose default stream is always there.
        let queued = unsafe { result::stream::wait_event(result::stream::null(), self.0, flags) };
        queued.map_err(|error| refusal("cuStreamWaitEvent", error))
    }

    /// Whether it has passed. Does not wait.
    ///
    /// # Errors
    /// CUDA's, of any earlier work too.
    #[allow(unsafe_code, reason = "see the module's Justification")]
    pub(super) fn has_passed(&self) -> Result<bool, GpuError> {
        // SAFETY: a live event.
        match unsafe { result::event::query(self.0) } {
            Ok(()) => Ok(true),
            Err(error) if error.0 == sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            Err(error) => Err(refusal("cuEventQuery", error)),
        }
    }
}

impl Drop for Event {
    #[allow(unsafe_code, reason = "see the module's Justification")]
    fn drop(&mut self) {
        // SAFETY: made once, destroyed once.
        let _ = unsafe { result::event::destroy(self.0) };
    }
}

/// Memory on the GPU.
pub(super) struct Memory {
    address: sys::CUdeviceptr,
    n_bytes: usize,
    _thread: PhantomData<*const ()>,
}

impl Memory {
    /// What `n_bytes` take in fact.
    pub(super) fn rounded(n_bytes: usize) -> usize {
        n_bytes.next_multiple_of(BLOCK_BYTES)
    }

    /// At least `n_bytes`, for this process alone.
    ///
    /// # Errors
    /// No memory left.
    #[allow(unsafe_code, reason = "see the module's Justification")]
    pub(super) fn new(_: &Context, n_bytes: usize) -> Result<Self, GpuError> {
        let n_bytes = Self::rounded(n_bytes);
        // SAFETY: nothing is read of it that was not written: slots are copied whole.
        let address = unsafe { result::malloc_sync(n_bytes) };
        let address = address.map_err(|error| refusal("cuMemAlloc", error))?;
        Ok(Self { address, n_bytes, _thread: PhantomData })
    }

    /// Of its first byte.
    pub(super) fn address(&self) -> usize {
        usize::try_from(self.address).expect("addresses have 64 bits")
    }

    /// At least `n_bytes`, and what another process opens them by.
    ///
    /// # Errors
    /// No memory left, or no sharing between processes.
    #[allow(unsafe_code, reason = "see the module's Justification")]
    pub(super) fn exported(
        context: &Context,
        n_bytes: usize,
    ) -> Result<(Self, IpcHandle), GpuError> {
        let memory = Self::new(context, n_bytes)?;
        let mut handle = sys::CUipcMemHandle { reserved: [0; 64] };
        // SAFETY: a place for the handle, and the address that cuMemAlloc gave.
        let result = unsafe { sys::cuIpcGetMemHandle(&raw mut handle, memory.address) };
        check("cuIpcGetMemHandle", result)?;
        Ok((memory, handle.reserved.map(|byte| byte as u8)))
    }

    /// Queues a copy of `n_bytes` from the host.
    ///
    /// # Errors
    /// CUDA's.
    ///
    /// # Panics
    /// The bytes are not in this memory.
    ///
    /// # Safety
    /// The bytes at `source` are mapped, and nobody writes them, until an event behind the copy has
    /// passed.
    #[allow(unsafe_code, reason = "see the module's Justification")]
    pub(super) unsafe fn copy_from(
        &self,
        offset: usize,
        source: *const u8,
        n_bytes: usize,
        stream: &Stream,
    ) -> Result<(), GpuError> {
        let end = offset.checked_add(n_bytes).expect("offsets are those of slots");
        assert!(end <= self.n_bytes, "byte {end} of {} on the GPU", self.n_bytes);
        let target = self.address + offset as sys::CUdeviceptr;
        let source = source.cast::<c_void>();
        // SAFETY: the target lies in this memory (assertion above), the source is the caller's
        // promise, and the stream is of the same context.
        let result = unsafe { sys::cuMemcpyHtoDAsync_v2(target, source, n_bytes, stream.0) };
        check("cuMemcpyHtoDAsync", result)
    }
}

impl Drop for Memory {
    #[allow(unsafe_code, reason = "see the module's Justification")]
    fn drop(&mut self) {
        // SAFETY: cuMemAlloc gave it, and it is freed once; CUDA waits for copies under way.
        let _ = unsafe { result::free_sync(self.address) };
    }
}

/// Host memory that the GPU can read by itself.
pub(super) struct Locked {
    address: *mut c_void,
    /// It must stay mapped until it is unlocked.
    _keep_alive: Arc<dyn Any + Send + Sync>,
}

impl Locked {
    /// # Errors
    /// CUDA's: the system allows no more locked memory.
    ///
    /// # Safety
    /// `n_bytes` are mapped at `address` as long as `keep_alive` lives.
    #[allow(unsafe_code, reason = "see the module's Justification")]
    pub(super) unsafe fn new(
        _: &Context,
        address: usize,
        n_bytes: usize,
        keep_alive: Arc<dyn Any + Send + Sync>,
    ) -> Result<Self, GpuError> {
        let address = std::ptr::with_exposed_provenance_mut::<c_void>(address);
        // SAFETY: the caller's promise.
        let result = unsafe { sys::cuMemHostRegister_v2(address, n_bytes, REGISTER_PORTABLE) };
        check("cuMemHostRegister", result)?;
        Ok(Self { address, _keep_alive: keep_alive })
    }
}

impl Drop for Locked {
    #[allow(unsafe_code, reason = "see the module's Justification")]
    fn drop(&mut self) {
        // SAFETY: registered once in `new`, and still mapped.
        let _ = unsafe { sys::cuMemHostUnregister(self.address) };
    }
}
