//! A `libnvidia-ml.so.1` that plays what a file says.
//!
//! It implements the functions that nvml-wrapper calls for fastaa-loaderd, and no others: a call of
//! another one fails there as with an old driver. The file, a JSON [`Script`] `script.json` beside
//! the library, is read at every call, so that a test can change what the GPUs do. Each test has a
//! copy of the library in a folder of its own.

#![allow(
    unsafe_code,
    non_snake_case,
    missing_docs,
    clippy::missing_safety_doc,
    clippy::undocumented_unsafe_blocks,
    reason = "a C library, with NVML's names; its callers follow NVML's manual"
)]

use std::ffi::{c_char, c_uint, c_ulonglong};
use std::path::PathBuf;

use nvml_wrapper_sys::bindings as nvml;
use serde::Deserialize;

const SUCCESS: u32 = 0;
const INVALID_ARGUMENT: u32 = 2;
const NOT_SUPPORTED: u32 = 3;
const NOT_FOUND: u32 = 6;
const INSUFFICIENT_SIZE: u32 = 7;

/// All GPUs.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Script {
    /// What `nvmlInit_v2` returns.
    init: u32,
    devices: Vec<Gpu>,
}

/// One GPU.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Gpu {
    uuid: String,
    name: String,
    /// Percent.
    utilisation: u32,
    memory_free: u64,
    memory_total: u64,
    processes: Vec<Process>,
    /// Whether use is told by process.
    tells_processes: bool,
    mig: bool,
    /// Percent of the multiprocessors; `None`: no GPM.
    gpm: Option<f64>,
    /// What every call on the device returns.
    fails: u32,
    /// How long every call takes.
    takes_ms: u64,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Process {
    pid: u32,
    /// Percent.
    sm: u32,
    /// It has a context through MPS.
    mps: bool,
}

fn script() -> Script {
    // A test may be writing it: it renames a whole file into place, so that this always reads one.
    match std::fs::read_to_string(folder().join("script.json")) {
        Ok(text) => serde_json::from_str(&text).expect("the script is valid"),
        // The test is over, and its folder gone; the thread that looks may not have heard of it.
        Err(_) => Script { init: 0, devices: Vec::new() },
    }
}

/// Where this library's file is: what is mapped at the address of one of its functions.
fn folder() -> PathBuf {
    let maps = std::fs::read_to_string("/proc/self/maps").expect("Linux");
    let here = nvmlInit_v2 as *const () as usize;
    let path = maps.lines().find_map(|line| {
        let (start, rest) = line.split_once('-')?;
        let start = usize::from_str_radix(start, 16).ok()?;
        let end = usize::from_str_radix(rest.split(' ').next()?, 16).ok()?;
        let is_here = (start..end).contains(&here);
        line.find('/').filter(|_| is_here).map(|at| PathBuf::from(&line[at..]))
    });
    let path = path.expect("it is mapped from a file");
    path.parent().expect("in a folder").to_owned()
}

/// Device number `index` is the pointer `index + 1`.
fn device(handle: nvml::nvmlDevice_t) -> Result<Gpu, u32> {
    let index = (handle as usize).checked_sub(1).ok_or(INVALID_ARGUMENT)?;
    let gpu = script().devices.get(index).cloned().ok_or(INVALID_ARGUMENT)?;
    #[allow(clippy::disallowed_methods, reason = "a driver that takes its time is played")]
    std::thread::sleep(std::time::Duration::from_millis(gpu.takes_ms));
    if gpu.fails == SUCCESS { Ok(gpu) } else { Err(gpu.fails) }
}

fn code(result: Result<(), u32>) -> u32 {
    result.err().unwrap_or(SUCCESS)
}

/// Writes a text that ends with 0 into a buffer, as NVML does.
unsafe fn write_text(text: &str, buffer: *mut c_char, length: c_uint) -> Result<(), u32> {
    if text.len() + 1 > length as usize {
        return Err(INSUFFICIENT_SIZE);
    }
    unsafe {
        std::ptr::copy_nonoverlapping(text.as_ptr().cast(), buffer, text.len());
        *buffer.add(text.len()) = 0;
    }
    Ok(())
}

/// Writes a list in NVML's two steps: without room, only its length.
unsafe fn write_list<T: Copy>(list: &[T], count: *mut c_uint, out: *mut T) -> Result<(), u32> {
    unsafe {
        let room = *count as usize;
        *count = u32::try_from(list.len()).expect("short lists");
        if out.is_null() || room < list.len() {
            return if list.is_empty() { Ok(()) } else { Err(INSUFFICIENT_SIZE) };
        }
        std::ptr::copy_nonoverlapping(list.as_ptr(), out, list.len());
    }
    Ok(())
}

#[unsafe(no_mangle)]
pub extern "C" fn nvmlInit_v2() -> u32 {
    script().init
}

#[unsafe(no_mangle)]
pub extern "C" fn nvmlShutdown() -> u32 {
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlSystemGetDriverVersion(out: *mut c_char, length: c_uint) -> u32 {
    code(unsafe { write_text("580.00", out, length) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetCount_v2(count: *mut c_uint) -> u32 {
    unsafe { *count = u32::try_from(script().devices.len()).expect("few GPUs") };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetHandleByIndex_v2(
    index: c_uint,
    out: *mut nvml::nvmlDevice_t,
) -> u32 {
    let handle = (index as usize + 1) as nvml::nvmlDevice_t;
    code(device(handle).map(|_| unsafe { *out = handle }))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetUUID(
    handle: nvml::nvmlDevice_t,
    out: *mut c_char,
    length: c_uint,
) -> u32 {
    code(device(handle).and_then(|gpu| unsafe { write_text(&gpu.uuid, out, length) }))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetName(
    handle: nvml::nvmlDevice_t,
    out: *mut c_char,
    length: c_uint,
) -> u32 {
    code(device(handle).and_then(|gpu| unsafe { write_text(&gpu.name, out, length) }))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetTemperature(
    handle: nvml::nvmlDevice_t,
    _sensor: c_uint,
    out: *mut c_uint,
) -> u32 {
    code(device(handle).map(|_| unsafe { *out = 41 }))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetPowerUsage(
    handle: nvml::nvmlDevice_t,
    out: *mut c_uint,
) -> u32 {
    code(device(handle).map(|_| unsafe { *out = 92_500 }))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetUtilizationRates(
    handle: nvml::nvmlDevice_t,
    out: *mut nvml::nvmlUtilization_t,
) -> u32 {
    code(device(handle).map(|gpu| unsafe {
        *out = nvml::nvmlUtilization_t { gpu: gpu.utilisation, memory: 0 };
    }))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetMemoryInfo_v2(
    handle: nvml::nvmlDevice_t,
    out: *mut nvml::nvmlMemory_v2_t,
) -> u32 {
    code(device(handle).map(|gpu| unsafe {
        (*out).total = gpu.memory_total;
        (*out).free = gpu.memory_free;
        (*out).used = gpu.memory_total - gpu.memory_free;
        (*out).reserved = 0;
    }))
}

unsafe fn processes(
    handle: nvml::nvmlDevice_t,
    count: *mut c_uint,
    out: *mut nvml::nvmlProcessInfo_t,
    is_wanted: impl Fn(&Process) -> bool,
) -> u32 {
    let info = |process: &Process| nvml::nvmlProcessInfo_t {
        pid: process.pid,
        usedGpuMemory: 1 << 30,
        gpuInstanceId: c_uint::MAX,
        computeInstanceId: c_uint::MAX,
    };
    code(device(handle).and_then(|gpu| {
        let list: Vec<_> = gpu.processes.iter().filter(|p| is_wanted(p)).map(info).collect();
        unsafe { write_list(&list, count, out) }
    }))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetComputeRunningProcesses_v3(
    handle: nvml::nvmlDevice_t,
    count: *mut c_uint,
    out: *mut nvml::nvmlProcessInfo_t,
) -> u32 {
    unsafe { processes(handle, count, out, |process| !process.mps) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetGraphicsRunningProcesses_v3(
    handle: nvml::nvmlDevice_t,
    count: *mut c_uint,
    out: *mut nvml::nvmlProcessInfo_t,
) -> u32 {
    unsafe { processes(handle, count, out, |_| false) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetMPSComputeRunningProcesses_v3(
    handle: nvml::nvmlDevice_t,
    count: *mut c_uint,
    out: *mut nvml::nvmlProcessInfo_t,
) -> u32 {
    unsafe { processes(handle, count, out, |process| process.mps) }
}

/// As the driver does it: only processes that did something, and `NOT_FOUND` if none did.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetProcessUtilization(
    handle: nvml::nvmlDevice_t,
    out: *mut nvml::nvmlProcessUtilizationSample_t,
    count: *mut c_uint,
    _since: c_ulonglong,
) -> u32 {
    let sample = |process: &Process| nvml::nvmlProcessUtilizationSample_t {
        pid: process.pid,
        timeStamp: 1,
        smUtil: process.sm,
        memUtil: 0,
        encUtil: 0,
        decUtil: 0,
    };
    code(device(handle).and_then(|gpu| {
        if !gpu.tells_processes {
            return Err(NOT_SUPPORTED);
        }
        let busy = gpu.processes.iter().filter(|process| process.sm > 0);
        let list: Vec<_> = busy.map(sample).collect();
        if list.is_empty() {
            return Err(NOT_FOUND);
        }
        unsafe { write_list(&list, count, out) }
    }))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetMigMode(
    handle: nvml::nvmlDevice_t,
    current: *mut c_uint,
    pending: *mut c_uint,
) -> u32 {
    code(device(handle).map(|gpu| unsafe {
        *current = u32::from(gpu.mig);
        *pending = u32::from(gpu.mig);
    }))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlGpmQueryDeviceSupport(
    handle: nvml::nvmlDevice_t,
    out: *mut nvml::nvmlGpmSupport_t,
) -> u32 {
    code(device(handle).map(|gpu| unsafe {
        (*out).isSupportedDevice = u32::from(gpu.gpm.is_some());
    }))
}

/// A sample is a copy of the device's share at its time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlGpmSampleAlloc(out: *mut nvml::nvmlGpmSample_t) -> u32 {
    unsafe { *out = Box::into_raw(Box::new(0.0f64)).cast() };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlGpmSampleFree(sample: nvml::nvmlGpmSample_t) -> u32 {
    drop(unsafe { Box::from_raw(sample.cast::<f64>()) });
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlGpmSampleGet(
    handle: nvml::nvmlDevice_t,
    sample: nvml::nvmlGpmSample_t,
) -> u32 {
    code(device(handle).and_then(|gpu| {
        unsafe { *sample.cast::<f64>() = gpu.gpm.ok_or(NOT_SUPPORTED)? };
        Ok(())
    }))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlGpmMetricsGet(request: *mut nvml::nvmlGpmMetricsGet_t) -> u32 {
    unsafe {
        let request = &mut *request;
        let value = *request.sample2.cast::<f64>();
        for metric in &mut request.metrics[..request.numMetrics as usize] {
            metric.value = value;
            metric.nvmlReturn = SUCCESS;
        }
    }
    SUCCESS
}
