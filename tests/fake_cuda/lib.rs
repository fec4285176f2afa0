//! A `libcuda.so.1` that plays one GPU for several processes.
//!
//! It implements the functions that fastaa-loaderd and the Python client call, and no others. The
//! GPU's memory is a file per allocation in the folder `$FAKE_CUDA`, which whoever opens its handle
//! maps as well; an event is a file with two counters. A stream is a thread that does its copies in
//! order, each after a pause of `$FAKE_CUDA_DELAY_US` (default 300): whoever does not wait for an
//! event reads what was there before.
//!
//! Faults are files in the same folder: `fail-NAME` holds the error that the function returns, and
//! as long as there is a `hold-NAME`, it does not return.
//!
//! What CUDA leaves undefined between two processes leaves a file `misused`.
//!
//! What it cannot play: which of two processes' writes to one GPU becomes visible when.

#![allow(
    unsafe_code,
    non_snake_case,
    missing_docs,
    clippy::missing_safety_doc,
    clippy::undocumented_unsafe_blocks,
    clippy::cast_possible_truncation,
    clippy::cast_ptr_alignment,
    clippy::disallowed_methods,
    reason = "a C library, with CUDA's names; its callers follow CUDA's manual"
)]

mod shared;
mod stream;

use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;

use crossbeam::channel::{Sender, bounded};

use shared::Shared;
use stream::{Work, start_stream};

type Result = c_int;
const SUCCESS: Result = 0;
const INVALID_VALUE: Result = 1;
const INVALID_CONTEXT: Result = 201;
const INVALID_HANDLE: Result = 400;
const NOT_READY: Result = 600;

const UUID: [u8; 16] = *b"a GPU, as played";
const CONTEXT: usize = 0xC0DE;
const EVENT_INTERPROCESS: c_uint = 4;

fn folder() -> PathBuf {
    std::env::var_os("FAKE_CUDA").expect("FAKE_CUDA names the folder of the played GPU").into()
}

/// The error that a function is to return, if a test says so, and when it may.
fn fault(function: &str) -> Option<Result> {
    while folder().join(format!("hold-{function}")).exists() {
        std::thread::sleep(Duration::from_millis(1));
    }
    let text = std::fs::read_to_string(folder().join(format!("fail-{function}"))).ok()?;
    Some(text.trim().parse().expect("an error's number"))
}

macro_rules! fail_if_told {
    ($function:literal) => {
        if let Some(error) = fault($function) {
            return error;
        }
    };
}

/// Most calls need a current context, which belongs to a thread.
macro_rules! needs_context {
    () => {
        if CURRENT.with_borrow(|stack| stack.last().is_none_or(|context| *context == 0)) {
            return INVALID_CONTEXT;
        }
    };
}

thread_local! {
    static CURRENT: std::cell::RefCell<Vec<usize>> = const { std::cell::RefCell::new(Vec::new()) };
}

/// Counts its records, and those that have passed.
type Event = Arc<Shared>;

#[derive(Default)]
struct World {
    memory: HashMap<u64, Shared>,
    events: HashMap<usize, Event>,
    streams: HashMap<usize, Sender<Work>>,
    locked: HashMap<usize, usize>,
    next: usize,
}

static WORLD: LazyLock<Mutex<World>> = LazyLock::new(Mutex::default);

impl World {
    fn key(&mut self) -> usize {
        self.next += 1;
        self.next << 4
    }

    /// A stream's queue; 0 is the default one, which is there unasked.
    fn stream(&mut self, key: usize) -> Option<Sender<Work>> {
        if key == 0 {
            self.streams.entry(0).or_insert_with(start_stream);
        }
        self.streams.get(&key).cloned()
    }
}

fn world() -> std::sync::MutexGuard<'static, World> {
    WORLD.lock().expect("no call panics")
}

fn put<T>(place: *mut T, value: T) {
    unsafe { place.write(value) };
}

/// `CUipcMemHandle` and `CUipcEventHandle`, passed by value.
#[repr(C)]
pub struct Handle([u8; 64]);

fn handle_of(name: u64) -> Handle {
    let mut handle = [0xA5; 64];
    handle[..8].copy_from_slice(&name.to_le_bytes());
    Handle(handle)
}

fn name_of(handle: Handle) -> u64 {
    u64::from_le_bytes(handle.0[..8].try_into().expect("8 bytes"))
}

// --- devices and contexts

#[unsafe(no_mangle)]
pub extern "C" fn cuInit(_: c_uint) -> Result {
    fail_if_told!("cuInit");
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGetCount(count: *mut c_int) -> Result {
    put(count, 1);
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> Result {
    if ordinal != 0 {
        return INVALID_VALUE;
    }
    put(device, 0);
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGetUuid_v2(uuid: *mut [u8; 16], _: c_int) -> Result {
    put(uuid, UUID);
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxRetain(context: *mut usize, _: c_int) -> Result {
    fail_if_told!("cuDevicePrimaryCtxRetain");
    put(context, CONTEXT);
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxRelease_v2(_: c_int) -> Result {
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSetCurrent(context: usize) -> Result {
    CURRENT.with_borrow_mut(|stack| {
        stack.pop();
        stack.push(context);
    });
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxPushCurrent_v2(context: usize) -> Result {
    CURRENT.with_borrow_mut(|stack| stack.push(context));
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxPopCurrent_v2(context: *mut usize) -> Result {
    CURRENT.with_borrow_mut(|stack| match stack.pop() {
        Some(popped) => {
            put(context, popped);
            SUCCESS
        }
        None => INVALID_CONTEXT,
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSynchronize() -> Result {
    needs_context!();
    let streams: Vec<_> = world().streams.values().cloned().collect();
    for stream in streams {
        let (sender, done) = bounded(1);
        stream.send(Work::Say(sender)).expect("streams live");
        done.recv().expect("streams live");
    }
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuGetErrorName(error: Result, text: *mut *const c_char) -> Result {
    let name: &CStr = match error {
        2 => c"CUDA_ERROR_OUT_OF_MEMORY",
        INVALID_CONTEXT => c"CUDA_ERROR_INVALID_CONTEXT",
        801 => c"CUDA_ERROR_NOT_SUPPORTED",
        _ => c"CUDA_ERROR_PLAYED",
    };
    put(text, name.as_ptr());
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuGetErrorString(error: Result, text: *mut *const c_char) -> Result {
    let words: &CStr = match error {
        2 => c"out of memory",
        INVALID_CONTEXT => c"invalid device context",
        801 => c"operation not supported",
        _ => c"a played error",
    };
    put(text, words.as_ptr());
    SUCCESS
}

// --- memory

#[unsafe(no_mangle)]
pub extern "C" fn cuMemAlloc_v2(address: *mut u64, n_bytes: usize) -> Result {
    needs_context!();
    fail_if_told!("cuMemAlloc");
    let made = Shared::make(n_bytes as u64);
    let at = made.map.as_mut_ptr().expose_provenance() as u64;
    world().memory.insert(at, made);
    put(address, at);
    SUCCESS
}

/// Of attributes the kind of memory alone: it is the host's, in truth, but for a test that puts
/// `device-memory` into the folder.
#[unsafe(no_mangle)]
pub extern "C" fn cuPointerGetAttribute(data: *mut c_uint, attribute: c_int, _: u64) -> Result {
    const MEMORY_TYPE: c_int = 2;
    const HOST: c_uint = 1;
    const DEVICE: c_uint = 2;
    if attribute != MEMORY_TYPE {
        return INVALID_VALUE;
    }
    put(data, if folder().join("device-memory").exists() { DEVICE } else { HOST });
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemFree_v2(address: u64) -> Result {
    needs_context!();
    match world().memory.remove(&address) {
        Some(memory) if memory.is_owner => SUCCESS,
        _ => INVALID_VALUE,
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuIpcGetMemHandle(handle: *mut Handle, address: u64) -> Result {
    needs_context!();
    fail_if_told!("cuIpcGetMemHandle");
    let world = world();
    let Some(memory) = world.memory.get(&address) else { return INVALID_VALUE };
    put(handle, handle_of(memory.name));
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuIpcOpenMemHandle_v2(
    address: *mut u64,
    handle: Handle,
    flags: c_uint,
) -> Result {
    needs_context!();
    fail_if_told!("cuIpcOpenMemHandle");
    if flags != 1 {
        return INVALID_VALUE;
    }
    let Some(memory) = Shared::open(name_of(handle)) else { return INVALID_HANDLE };
    let at = memory.map.as_mut_ptr().expose_provenance() as u64;
    world().memory.insert(at, memory);
    put(address, at);
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuIpcCloseMemHandle(address: u64) -> Result {
    needs_context!();
    fail_if_told!("cuIpcCloseMemHandle");
    match world().memory.remove(&address) {
        Some(memory) if !memory.is_owner => SUCCESS,
        _ => INVALID_VALUE,
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemHostRegister_v2(address: *mut c_void, n_bytes: usize, _: c_uint) -> Result {
    needs_context!();
    fail_if_told!("cuMemHostRegister");
    world().locked.insert(address.addr(), n_bytes);
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemHostUnregister(address: *mut c_void) -> Result {
    needs_context!();
    if world().locked.remove(&address.addr()).is_some() { SUCCESS } else { INVALID_VALUE }
}

fn copy(target: usize, source: usize, n_bytes: usize, stream: usize) -> Result {
    let Some(queue) = world().stream(stream) else { return INVALID_HANDLE };
    queue.send(Work::Copy { target, source, n_bytes }).expect("streams live");
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyHtoDAsync_v2(
    target: u64,
    source: *const c_void,
    n_bytes: usize,
    stream: usize,
) -> Result {
    needs_context!();
    fail_if_told!("cuMemcpyHtoDAsync");
    copy(target as usize, source.expose_provenance(), n_bytes, stream)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyDtoHAsync_v2(
    target: *mut c_void,
    source: u64,
    n_bytes: usize,
    stream: usize,
) -> Result {
    needs_context!();
    copy(target.expose_provenance(), source as usize, n_bytes, stream)
}

// --- streams and events

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamCreate(stream: *mut usize, _: c_uint) -> Result {
    needs_context!();
    let mut world = world();
    let key = world.key();
    world.streams.insert(key, start_stream());
    put(stream, key);
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamDestroy_v2(stream: usize) -> Result {
    needs_context!();
    if world().streams.remove(&stream).is_some() { SUCCESS } else { INVALID_HANDLE }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventCreate(event: *mut usize, flags: c_uint) -> Result {
    needs_context!();
    if flags & EVENT_INTERPROCESS != 0 {
        fail_if_told!("cuEventCreate");
    }
    let mut world = world();
    let key = world.key();
    world.events.insert(key, Arc::new(Shared::make(16)));
    put(event, key);
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventDestroy_v2(event: usize) -> Result {
    needs_context!();
    if world().events.remove(&event).is_some() { SUCCESS } else { INVALID_HANDLE }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventRecord(event: usize, stream: usize) -> Result {
    needs_context!();
    fail_if_told!("cuEventRecord");
    let mut world = world();
    let Some(event) = world.events.get(&event).cloned() else { return INVALID_HANDLE };
    event.is_used();
    let Some(queue) = world.stream(stream) else { return INVALID_HANDLE };
    let record = event.counter(0).fetch_add(1, Ordering::AcqRel) + 1;
    queue.send(Work::Pass { event, record }).expect("streams live");
    SUCCESS
}

fn state_of(event: usize) -> Result {
    let world = world();
    let Some(event) = world.events.get(&event) else { return INVALID_HANDLE };
    event.is_used();
    let is_over =
        event.counter(1).load(Ordering::Acquire) == event.counter(0).load(Ordering::Acquire);
    if is_over { SUCCESS } else { NOT_READY }
}

fn wait_for(event: usize) -> Result {
    loop {
        match state_of(event) {
            NOT_READY => std::thread::sleep(Duration::from_micros(50)),
            result => return result,
        }
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventQuery(event: usize) -> Result {
    needs_context!();
    fail_if_told!("cuEventQuery");
    state_of(event)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventSynchronize(event: usize) -> Result {
    needs_context!();
    wait_for(event)
}

/// For the default stream alone, whose work is the host's own here: so the host waits.
#[unsafe(no_mangle)]
pub extern "C" fn cuStreamWaitEvent(stream: usize, event: usize, _: c_uint) -> Result {
    needs_context!();
    fail_if_told!("cuStreamWaitEvent");
    if stream == 0 { wait_for(event) } else { INVALID_HANDLE }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamSynchronize(_: usize) -> Result {
    cuCtxSynchronize()
}

#[unsafe(no_mangle)]
pub extern "C" fn cuIpcGetEventHandle(handle: *mut Handle, event: usize) -> Result {
    needs_context!();
    let world = world();
    let Some(event) = world.events.get(&event) else { return INVALID_HANDLE };
    put(handle, handle_of(event.name));
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuIpcOpenEventHandle(event: *mut usize, handle: Handle) -> Result {
    needs_context!();
    let Some(opened) = Shared::open(name_of(handle)) else { return INVALID_HANDLE };
    let mut world = world();
    let key = world.key();
    world.events.insert(key, Arc::new(opened));
    put(event, key);
    SUCCESS
}
