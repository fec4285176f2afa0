//! How much memory a fold model takes, and whether there is as much: an error in words beats the
//! kernel's killing of the process.
//!
//! Owns the estimate and the reading of the kernel's accounts. Never allocates.

use std::fs;
use std::path::Path;

use tch::Device;

use crate::pipeline::render::OutputShape;

use super::spec::ModelSpec;
use super::{FoldTraining, TorchError};

/// Bytes per weight: master, gradient and momentum in f32, a copy in bf16, and what a step of the
/// optimiser and reordered copies of the kernels take for a while.
const WEIGHT_BYTES: u64 = 4 + 4 + 4 + 2 + 6;
/// Bytes per activation, as if all were f32.
const ACTIVATION_BYTES: u64 = 4;
/// Bytes that the process takes for libtorch itself, once.
const LIBTORCH_BYTES: u64 = 256 << 20;

/// Estimate of the bytes that training one model takes: weights, and the activations of a batch
/// with the gradients on their way back. An upper bound for the built-in models. A TorchScript
/// module is counted as ResNet-18's activations and the file's size in weights.
pub fn memory_needed(
    spec: &ModelSpec,
    shape: &OutputShape,
    n_classes: u32,
    batch_size: usize,
) -> u64 {
    let plan = spec.plan(shape).or_else(|| ModelSpec::ResNet18.plan(shape));
    let plan = plan.expect("ResNet-18 has layers");
    let n_weights = match spec {
        ModelSpec::TorchScript(path) => fs::metadata(path).map_or(0, |file| file.len() / 4),
        _ => plan.n_weights(n_classes),
    };
    let pixels = (shape.height * shape.width * shape.channels) as u64;
    // Gradients of activations live while their layer is passed back, and the allocator keeps
    // holes: measured peaks of the built-in models lie below twice the activations.
    let n_values = plan.n_activations(shape.height, shape.width) * 2 + 2 * pixels;
    let of_batch = n_values.saturating_mul(batch_size as u64).saturating_mul(ACTIVATION_BYTES);
    n_weights.saturating_mul(WEIGHT_BYTES).saturating_add(of_batch)
}

/// Checks that the host has the memory for `n_models` models that are trained at once. Models on a
/// GPU are not checked: CUDA says itself what it lacks.
///
/// # Errors
/// There is less than needed; the message gives both and the cure.
pub fn check_memory(
    spec: &ModelSpec,
    shape: &OutputShape,
    n_classes: u32,
    training: &FoldTraining,
    n_models: usize,
) -> Result<(), TorchError> {
    if training.device != Device::Cpu {
        return Ok(());
    }
    let of_model = memory_needed(spec, shape, n_classes, training.batch_size);
    let needed = of_model.saturating_mul(n_models as u64).saturating_add(LIBTORCH_BYTES);
    let Some(available) = available_below(Path::new("/")) else { return Ok(()) };
    if needed <= available {
        return Ok(());
    }
    let what = format!(
        "{n_models} fold model(s) '{spec}' on batches of {} images of {}x{}x{}",
        training.batch_size, shape.height, shape.width, shape.channels
    );
    Err(TorchError::Memory { what, needed_mib: needed >> 20, available_mib: available >> 20 })
}

/// Bytes that this process can still take: what the host has, and what its control groups allow.
/// `None` where the kernel does not tell.
fn available_below(root: &Path) -> Option<u64> {
    let meminfo = fs::read_to_string(root.join("proc/meminfo")).ok()?;
    let mut words = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?.split(' ');
    let mut available = words.find_map(|word| word.parse::<u64>().ok())? << 10;
    let groups = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(group)) = (parts.next(), parts.next()) else { continue };
        let (mount, names) = match controllers {
            "" => ("sys/fs/cgroup", ["memory.max", "memory.current", "inactive_file"]),
            _ if controllers.split(',').any(|controller| controller == "memory") => {
                let names =
                    ["memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"];
                ("sys/fs/cgroup/memory", names)
            }
            _ => continue,
        };
        // Limits of the groups above hold too. In a container the group's path may name nothing:
        // its own group is then the mount itself.
        for group in Path::new(group.trim_start_matches('/')).ancestors() {
            let allowed = allowed_in(&root.join(mount).join(group), names);
            available = allowed.map_or(available, |allowed| available.min(allowed));
        }
    }
    Some(available)
}

/// What a control group still allows; the page cache that it can give back counts as free.
fn allowed_in(group: &Path, [limit, usage, cache]: [&str; 3]) -> Option<u64> {
    let number = |name: &str| -> Option<u64> {
        fs::read_to_string(group.join(name)).ok()?.trim().parse().ok()
    };
    let (limit, usage) = (number(limit)?, number(usage)?);
    let stat = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
    let cached = stat.lines().find_map(|line| line.strip_prefix(cache)?.trim().parse::<u64>().ok());
    Some(limit.saturating_sub(usage.saturating_sub(cached.unwrap_or(0))))
}

#[cfg(test)]
mod tests {
    use crate::dataset::LabelKind;
    use crate::pipeline::recipe::{Dtype, Layout};

    use super::*;

    fn shape(side: usize) -> OutputShape {
        OutputShape {
            views: 1,
            height: side,
            width: side,
            channels: 3,
            dtype: Dtype::F32,
            layout: Layout::Nhwc,
            labels: LabelKind::Class { n_classes: 10 },
        }
    }

    #[test]
    fn an_absurd_shape_is_refused_with_a_cure() {
        let training = FoldTraining::default();
        check_memory(&ModelSpec::SmallCnn, &shape(28), 10, &training, 2).expect("fits");
        let error = check_memory(&ModelSpec::ResNet18, &shape(100_000), 10, &training, 2)
            .expect_err("must be refused")
            .to_string();
        for part in
            ["100000x100000x3", "MiB", "'resnet18'", "fewer search.threads", "smaller search.model"]
        {
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn more_images_and_wider_models_need_more() {
        let needed = |spec: &str, side, batch_size| {
            memory_needed(&ModelSpec::parse(spec).expect("known"), &shape(side), 10, batch_size)
        };
        assert!(needed("small-cnn", 28, 128) < 64 << 20);
        assert!(needed("small-cnn", 28, 256) > needed("small-cnn", 28, 128));
        assert!(needed("wrn-28-10", 32, 128) > 4 << 30);
        assert!(needed("wrn-28-10", 32, 128) > 5 * needed("wrn-28-2", 32, 128) / 2);
    }

    #[test]
    fn the_strictest_account_counts() {
        let root = tempfile::tempdir().expect("a folder");
        let write = |name: &str, text: &str| {
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().expect("has one")).expect("makes");
            fs::write(path, text).expect("writes");
        };
        assert_eq!(available_below(root.path()), None);
        write("proc/meminfo", "MemTotal: 900 kB\nMemAvailable:     800 kB\n");
        assert_eq!(available_below(root.path()), Some(800 << 10));
        write("proc/self/cgroup", "0::/a/b\n");
        write("sys/fs/cgroup/a/b/memory.max", "max\n");
        write("sys/fs/cgroup/a/b/memory.current", "5000\n");
        assert_eq!(available_below(root.path()), Some(800 << 10));
        write("sys/fs/cgroup/a/memory.max", "100000\n");
        write("sys/fs/cgroup/a/memory.current", "70000\n");
        write("sys/fs/cgroup/a/memory.stat", "anon 1\ninactive_file 20000\nfile 3\n");
        assert_eq!(available_below(root.path()), Some(50_000));
        write("proc/self/cgroup", "9:cpu:/x\n4:memory:/x\n0::/\n");
        write("sys/fs/cgroup/memory/memory.limit_in_bytes", "9000\n");
        write("sys/fs/cgroup/memory/memory.usage_in_bytes", "1000\n");
        assert_eq!(available_below(root.path()), Some(8000));
    }
}
