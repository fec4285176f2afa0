//! What a client is told when it is let in: all it needs to read its slots.

use crate::dataset::LabelKind;
use crate::pipeline::recipe::{Dtype, Layout};

use super::session::Session;
use super::wire::{GpuMemory, Welcome, WireDtype, WireLabels, WireLayout};

/// The welcome to a session's client, which connects its DEALER socket to `endpoint`.
pub(super) fn welcome(session: &Session, endpoint: &str) -> Welcome {
    let shape = *session.stream.shape();
    let info = session.stream.spec.split.info();
    let layout = session.slab.layout();
    let small = |value: usize| u32::try_from(value).expect("sides are at most IMAGE_SIDE_MAX");
    Welcome {
        session: session.id,
        token: session.token,
        endpoint: endpoint.to_owned(),
        slot_bytes: layout.slot_bytes as u64,
        n_slots: session.n_slots(),
        labels_offset: layout.labels_offset as u64,
        indices_offset: layout.indices_offset as u64,
        batch_size: session.request.batch_size,
        height: small(shape.height),
        width: small(shape.width),
        channels: small(shape.channels),
        dtype: match shape.dtype {
            Dtype::U8 => WireDtype::U8,
            Dtype::F16 => WireDtype::F16,
            Dtype::Bf16 => WireDtype::Bf16,
            Dtype::F32 => WireDtype::F32,
        },
        layout: match shape.layout {
            Layout::Nchw => WireLayout::Nchw,
            Layout::Nhwc => WireLayout::Nhwc,
        },
        labels: match shape.labels {
            LabelKind::Class { n_classes } => WireLabels::Class { n_classes },
            LabelKind::Vector { len } => WireLabels::Vector { len },
        },
        n_samples: info.n_samples,
        fingerprint: info.fingerprint.0.clone(),
        recipe_json: session.stream.recipe_json.clone(),
        daemon_version: env!("CARGO_PKG_VERSION").to_owned(),
        n_window_slots: session.window.as_ref().map_or(0, |window| window.slab.n_slots()),
        gpu: session.gpu.as_ref().map(|gpu| {
            let exported = gpu.exported();
            let layout = session.gpu_layout.as_ref().unwrap_or(layout);
            Box::new(GpuMemory {
                memory: exported.memory,
                events: exported.events.clone(),
                slot_bytes: layout.slot_bytes as u64,
                labels_offset: layout.labels_offset as u64,
            })
        }),
        gpu_refused: session.gpu_refused.clone(),
    }
}
