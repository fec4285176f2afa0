//! When the search may compute: only on what nobody else uses.
//!
//! Data flows one way: the streams' [`demand`], samples of the GPU ([`gpu`], by [`nvml`]) and of
//! the processors ([`cpu`]) go into one pure decision ([`decision`]), whose result the search's
//! supervision carries out. Nothing here signals a process or starts one.

pub mod cpu;
pub mod decision;
pub mod demand;
pub mod gpu;
pub mod nvml;
pub mod nvml_choice;
