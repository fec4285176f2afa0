//! The user's own TorchScript module as a fold model.
//!
//! Owns the checks of the file and the module. It runs in f32 as it is, and its initial weights are
//! the file's. Its statistics (buffers) are reachable only through the module's own archive, so a
//! checkpoint holds that archive.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::process;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use tch::{CModule, Device, Kind, TchError, Tensor, no_grad};

use crate::pipeline::render::OutputShape;

use super::TorchError;

/// Name of the module's archive in a checkpoint.
const ARCHIVE_NAME: &str = "module";
/// Images of the batch on which a module is checked.
const N_CHECKED: i64 = 2;

/// A module that passed the checks.
pub(super) struct Script {
    device: Device,
    /// A module runs in the mode that it was last switched to: one call at a time.
    module: Mutex<CModule>,
}

impl Script {
    /// Loads the file and checks the module on a batch of two images.
    ///
    /// # Errors
    /// The file is no module, has nothing to train, or does not make `[n, n_classes]` f32 of
    /// images of `shape`, or not the same twice.
    pub(super) fn new(
        path: &Path,
        shape: &OutputShape,
        n_classes: u32,
        device: Device,
    ) -> Result<Self, TorchError> {
        // Compiled the same way in the first step and in the millionth, so that a training that
        // was cut goes on bit for bit: no recompilation after some runs of profiling.
        tch::jit::f_set_profiling_mode(false)?;
        let refused =
            |problem: String| TorchError::Script { path: path.display().to_string(), problem };
        let bytes = fs::read(path).map_err(|error| refused(format!("cannot be read: {error}")))?;
        let module = load(&bytes, device).map_err(|error| {
            let reason = reason(&error);
            refused(format!("is no TorchScript module ({reason}); save it with torch.jit.script"))
        })?;
        let script = Self { device, module: Mutex::new(module) };
        let trained = script.trained()?;
        if trained.is_empty() {
            return Err(refused("has no trainable parameters".to_owned()));
        }
        if let Some((name, tensor)) = trained.iter().find(|(_, t)| t.kind() != Kind::Float) {
            let kind = tensor.kind();
            return Err(refused(format!("parameter '{name}' is {kind:?}; save it in float32")));
        }
        script.check(shape, n_classes).map_err(refused)?;
        // The check moved the module's statistics: begin again from the file's.
        *script.module.lock().unwrap_or_else(PoisonError::into_inner) = load(&bytes, device)?;
        Ok(script)
    }

    fn check(&self, shape: &OutputShape, n_classes: u32) -> Result<(), String> {
        let side = |side: usize| i64::try_from(side).expect("at most IMAGE_SIDE_MAX");
        let sizes = [N_CHECKED, side(shape.channels), side(shape.height), side(shape.width)];
        let images = Tensor::arange(sizes.iter().product::<i64>(), (Kind::Float, self.device));
        let images = images.sin().reshape(sizes);
        let run = || no_grad(|| self.forward(&images, true));
        let outputs = run().and_then(|first| Ok((first, run()?)));
        let (first, second) = outputs.map_err(|error| {
            let reason = reason(&error);
            format!("its forward fails on f32 images of shape {sizes:?}: {reason}")
        })?;
        let expected = [N_CHECKED, i64::from(n_classes)];
        if first.size() != expected || first.kind() != Kind::Float {
            return Err(format!(
                "its output for images of shape {sizes:?} is {:?} of shape {:?}, but must be \
                 Float of shape {expected:?}: one logit per class",
                first.kind(),
                first.size()
            ));
        }
        if i64::try_from(first.isfinite().all()).is_ok_and(|is_finite| is_finite == 0) {
            return Err(format!(
                "its output for images of shape {sizes:?} with values between -1 and 1 is not \
                 finite; look for a division by zero, or weights that are no numbers"
            ));
        }
        if first != second {
            return Err("its output is random in training mode; take the dropout out, because a \
                        search must be repeatable"
                .to_owned());
        }
        Ok(())
    }

    /// `[n, channels, height, width]` f32 → logits `[n, n_classes]`.
    pub(super) fn forward(&self, images: &Tensor, train: bool) -> Result<Tensor, TchError> {
        let mut module = self.module.lock().unwrap_or_else(PoisonError::into_inner);
        if train {
            module.f_set_train()?;
        } else {
            module.f_set_eval()?;
        }
        module.forward_ts(&[images])
    }

    /// The trained tensors, by name.
    pub(super) fn trained(&self) -> Result<Vec<(String, Tensor)>, TchError> {
        let module = self.module.lock().unwrap_or_else(PoisonError::into_inner);
        let named = module.named_parameters()?;
        Ok(named.into_iter().filter(|(_, tensor)| tensor.requires_grad()).collect())
    }

    /// The module's archive, as the tensor of a checkpoint.
    pub(super) fn state(&self) -> Result<(String, Tensor), TorchError> {
        Ok((ARCHIVE_NAME.to_owned(), Tensor::from_slice(&self.archive()?)))
    }

    /// Goes on from the archive in a checkpoint. The tensors of [`Self::trained`] are new then.
    pub(super) fn load(&self, named: &BTreeMap<String, Tensor>) -> Result<(), TorchError> {
        let foreign = |tensor: &str| TorchError::ForeignCheckpoint { tensor: tensor.to_owned() };
        let saved = named.get(ARCHIVE_NAME).filter(|saved| saved.kind() == Kind::Uint8);
        let bytes: Vec<u8> = saved.ok_or_else(|| foreign(ARCHIVE_NAME))?.try_into()?;
        let module = load(&bytes, self.device)?;
        let shapes = |module: &CModule| -> Result<BTreeMap<String, Vec<i64>>, TchError> {
            let named = module.named_parameters()?;
            Ok(named.into_iter().map(|(name, tensor)| (name, tensor.size())).collect())
        };
        let mut own = self.module.lock().unwrap_or_else(PoisonError::into_inner);
        if shapes(&module)? != shapes(&own)? {
            return Err(foreign(ARCHIVE_NAME));
        }
        *own = module;
        Ok(())
    }

    /// libtorch writes archives to files only, and puts the file's name into them: hence a folder
    /// of our own and always the same name.
    fn archive(&self) -> Result<Vec<u8>, TorchError> {
        static N_ARCHIVES: AtomicU64 = AtomicU64::new(0);
        let number = N_ARCHIVES.fetch_add(1, Ordering::Relaxed);
        let name = format!("fastaa-module-{}-{number}", process::id());
        let folder = std::env::temp_dir().join(name);
        let failed = |source| TorchError::Io { path: folder.display().to_string(), source };
        DirBuilder::new().mode(0o700).create(&folder).map_err(failed)?;
        let file = folder.join("module.pt");
        let mut module = self.module.lock().unwrap_or_else(PoisonError::into_inner);
        // The mode is in the archive: the same weights are to be the same bytes.
        module.f_set_train()?;
        let written = module.save(&file);
        drop(module);
        let bytes = fs::read(&file);
        fs::remove_dir_all(&folder).map_err(failed)?;
        written?;
        bytes.map_err(failed)
    }
}

fn load(mut bytes: &[u8], device: Device) -> Result<CModule, TchError> {
    CModule::load_data_on_device(&mut bytes, device)
}

/// The line of libtorch's message that says what is wrong: the rest is where.
fn reason(error: &TchError) -> String {
    let text = error.to_string();
    let lines = || text.lines().map(str::trim).filter(|line| !line.is_empty());
    let raised = lines().rev().find(|line| line.starts_with("RuntimeError"));
    raised.or_else(|| lines().next()).unwrap_or("no reason given").to_owned()
}
