//! From pointers to arguments: reading structs, making slices and buffers, choosing the back end.

use super::types::*;
use super::{
    Failure, PACE_ERROR_DTYPE, PACE_ERROR_LENGTH, PACE_ERROR_SIZE, PACE_ERROR_VALUE, PACE_ERROR_VERSION,
    PaceDevice, PaceStatus, Result, process, run,
};
use crate::cpu::Base;
use crate::cuda::{Buffer, DType, Gpu, Plan, Source};
use crate::noise::{Generator, Key, Noise, NoiseShape};
use crate::{Element, LinearShape, Real};
use half::bf16;
use std::ffi::c_void;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

/// A struct of arguments.
///
/// # Safety
/// `repr(C)`, begins with `size: u64` and `dtype: u32`, and any bytes are a value of it.
pub(super) unsafe trait Args: Copy {
    /// Its size in version 1.
    const FIRST_SIZE: usize;
    fn dtype(&self) -> u32;
}

macro_rules! args {
    ($($name:ident: $first_size:literal,)*) => {$(
        // SAFETY: see the definitions in `types`: numbers and raw pointers only, in the order that the trait asks for.
        unsafe impl Args for $name {
            const FIRST_SIZE: usize = $first_size;
            fn dtype(&self) -> u32 {
                self.dtype
            }
        }
        // A struct grows at its end; what old callers pass stays what it was.
        const _: () = assert!(
            size_of::<$name>() >= $first_size
                && align_of::<$name>() == 8
                && std::mem::offset_of!($name, size) == 0
                && std::mem::offset_of!($name, dtype) == 8
        );
    )*};
}

args! {
    PaceNoiseFill: 136,
    PaceNoisyLinear: 296,
    PaceLowRankLinear: 360,
    PaceLoraMulLinear: 416,
    PaceNoisyEpilogue: 184,
    PaceLowRankWeight: 176,
    PacePromptBias: 216,
    PaceMerge: 48,
    PaceLoss: 184,
    PaceLmHead: 344,
    PaceDropPath: 152,
    PaceGradNorm: 64,
    PaceFpDistance: 96,
}

/// Larger than any struct will ever be, so that a wild `size` does not make the library read far.
const MAX_SIZE: usize = 4096;

/// Reads a struct of any version.
///
/// # Safety
/// `args` is NULL, misaligned, or points to a struct of at least as many bytes as its first eight say.
pub(super) unsafe fn read<A: Args>(args: *const A) -> Result<A> {
    if args.is_null() {
        return Err(Failure::argument("args", "is a null pointer"));
    }
    if !args.is_aligned() {
        return Err(Failure::argument("args", "is not aligned"));
    }
    // SAFETY: aligned, and the caller's promise.
    let size = unsafe { args.cast::<u64>().read() };
    let known = size_of::<A>();
    let size = usize::try_from(size)
        .ok()
        // Every version ends with a whole field: half a pointer is none.
        .filter(|size| (A::FIRST_SIZE..=MAX_SIZE).contains(size) && size.is_multiple_of(8))
        .ok_or_else(|| {
            let name = std::any::type_name::<A>().rsplit("::").next().unwrap_or_default();
            Failure::new(
                PACE_ERROR_VERSION,
                format!("`args->size` is {size}, expected sizeof({name}) = {known}"),
            )
        })?;
    // SAFETY: `size` bytes may be read, by the caller's promise.
    let bytes = unsafe { std::slice::from_raw_parts(args.cast::<u8>(), size) };
    if bytes.iter().skip(known).any(|&byte| byte != 0) {
        let text = "that of a newer version of the library, and what this one does not know is used";
        return Err(Failure::new(PACE_ERROR_VERSION, format!("`args->size` is {size}, {text}")));
    }
    let mut value = MaybeUninit::<A>::zeroed();
    // SAFETY: both have room for as many bytes; any bytes are a value of `A`.
    unsafe {
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), value.as_mut_ptr().cast(), size.min(known));
        Ok(value.assume_init())
    }
}

/// One direction of an operator, on both back ends.
pub(super) trait Operator<A> {
    /// On the tensors of `args`, which are `host`'s.
    fn on_cpu<T: Real>(args: &A, host: &mut Host<'_, T>) -> Result<()>;
    /// The same in `bf16`, which only layers take there.
    fn on_cpu_in_bf16(_: &A, _: &mut Host<'_, bf16>) -> Result<()> {
        Err(dtype("`dtype` is PACE_BF16, and on the CPU this operator takes PACE_F32 and PACE_F64 only"))
    }
    /// The same on a device.
    fn plan(args: &A, gpu: &Gpu, dtype: DType) -> Result<Plan>;
}

/// Runs an operator on the CPU or on a device.
///
/// # Safety
/// `args` as in [`read`]. `device` is NULL or an open device, `stream` NULL or a live stream of its context. Every tensor of
/// `args` is absent, or memory of its length where the operator runs, initialised unless it is an output, that nothing else
/// touches in conflict until the operator has run.
pub(super) unsafe fn call<O: Operator<A>, A: Args>(
    device: *const PaceDevice,
    stream: *mut c_void,
    args: *const A,
) -> PaceStatus {
    run(|| {
        // SAFETY: the caller's promise.
        let args = unsafe { read(args) }?;
        // SAFETY: the caller's promise.
        match unsafe { device.as_ref() } {
            None if !stream.is_null() => {
                Err(Failure::argument("stream", "needs a device; on the CPU it is NULL"))
            }
            None => process::check_threads().and_then(|()| match args.dtype() {
                // SAFETY: the caller's promise.
                PACE_F32 => O::on_cpu::<f32>(&args, &mut unsafe { Host::new() }),
                // SAFETY: the caller's promise.
                PACE_F64 => O::on_cpu::<f64>(&args, &mut unsafe { Host::new() }),
                // SAFETY: the caller's promise.
                PACE_BF16 => O::on_cpu_in_bf16(&args, &mut unsafe { Host::new() }),
                PACE_F16 => Err(dtype(
                    "`dtype` is PACE_F16, and the CPU takes PACE_F32 and PACE_F64, and for layers PACE_BF16",
                )),
                other => Err(dtype(&format!("`dtype` is {other}, which is no type"))),
            }),
            Some(device) => {
                let plan = O::plan(&args, device.gpu(), device_dtype(args.dtype())?)?;
                // SAFETY: the caller's promise; the plan is unchanged.
                unsafe { device.launch(&plan, stream) }
            }
        }
    })
}

/// Answers a workspace query: `bytes_on_device` is asked only if there is a device.
///
/// # Safety
/// `device` and `args` as in [`call`]; `bytes` is NULL or a place for a number.
pub(super) unsafe fn workspace<A: Args>(
    device: *const PaceDevice,
    args: *const A,
    bytes: *mut u64,
    bytes_on_device: impl FnOnce(&A, &Gpu, DType) -> Result<usize>,
) -> PaceStatus {
    run(|| {
        if bytes.is_null() || !bytes.is_aligned() {
            return Err(Failure::argument("bytes", "is a null or misaligned pointer"));
        }
        // SAFETY: the caller's promise.
        let args = unsafe { read(args) }?;
        // SAFETY: the caller's promise.
        let needed = match unsafe { device.as_ref() } {
            None => 0,
            Some(device) => bytes_on_device(&args, device.gpu(), device_dtype(args.dtype())?)?,
        };
        // SAFETY: the caller's promise.
        unsafe { bytes.write(needed as u64) };
        Ok(())
    })
}

fn dtype(text: &str) -> Failure {
    Failure::new(PACE_ERROR_DTYPE, text)
}

fn device_dtype(code: u32) -> Result<DType> {
    match code {
        PACE_F32 => Ok(DType::F32),
        PACE_F16 => Ok(DType::F16),
        PACE_BF16 => Ok(DType::BF16),
        PACE_F64 => Err(dtype("`dtype` is PACE_F64, and CUDA takes PACE_F32, PACE_F16 and PACE_BF16 only")),
        other => Err(dtype(&format!("`dtype` is {other}, which is no type"))),
    }
}

/// A size as this machine counts.
pub(super) fn size(name: &str, value: u64) -> Result<usize> {
    usize::try_from(value)
        .map_err(|_| Failure::new(PACE_ERROR_SIZE, format!("`{name}` is {value}, which is too large")))
}

/// A number that stands for yes or no.
pub(super) fn flag(name: &str, value: u64) -> Result<bool> {
    match value {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(Failure::new(PACE_ERROR_VALUE, format!("`{name}` is {value}, expected 0 or 1"))),
    }
}

/// Checks that only flags which an operator knows are set.
pub(super) fn check_flags(flags: u32, known: u32) -> Result<()> {
    check_flags_of("flags", flags, known)
}

/// The same of a field of another name.
pub(super) fn check_flags_of(name: &str, flags: u32, known: u32) -> Result<()> {
    if flags & !known == 0 {
        return Ok(());
    }
    Err(Failure::new(PACE_ERROR_VALUE, format!("`{name}` is {flags}, of which the operator knows {known}")))
}

pub(super) fn linear_shape(shape: &PaceShape) -> Result<LinearShape> {
    Ok(LinearShape {
        branches: size("shape.branches", shape.branches)?,
        batch: size("shape.batch", shape.batch)?,
        tokens: size("shape.tokens", shape.tokens)?,
        in_features: size("shape.in_features", shape.in_features)?,
        out_features: size("shape.out_features", shape.out_features)?,
        shared_input: flag("shape.shared_input", shape.shared_input)?,
    })
}

fn noise_shape(noise: &PaceNoise) -> Result<NoiseShape> {
    if noise.reserved != 0 {
        return Err(Failure::new(PACE_ERROR_VALUE, "`noise.reserved` is not 0"));
    }
    match noise.shape {
        PACE_PER_SAMPLE => Ok(NoiseShape::PerSample),
        PACE_PER_TOKEN => Ok(NoiseShape::PerToken),
        other => Err(Failure::new(PACE_ERROR_VALUE, format!("`noise.shape` is {other}, expected 0 or 1"))),
    }
}

pub(super) fn key(value: u64) -> Key {
    Key([value as u32, (value >> 32) as u32])
}

/// The generator of generated noise; `key` is its key.
pub(super) fn generator(noise: &PaceNoise, key: Key) -> Result<Generator> {
    Ok(Generator::new(key, noise.sigma, noise_shape(noise)?, noise.first_sample)?)
}

fn bad_kind(kind: u32) -> Failure {
    Failure::new(PACE_ERROR_VALUE, format!("`noise.kind` is {kind}, expected 0, 1 or 2"))
}

/// Where the caller's tensors lie. An operator is made of a C struct once, for whichever memory.
pub(super) trait Memory {
    /// A tensor that is read.
    type Tensor: Copy;
    /// A tensor that is written.
    type TensorMut;
    /// Where `z` comes from.
    type Noise;

    fn input(&mut self, name: &'static str, tensor: PaceTensor) -> Result<Self::Tensor>;
    fn output(&mut self, name: &'static str, tensor: PaceTensor) -> Result<Self::TensorMut>;
    fn noise(&mut self, noise: &PaceNoise) -> Result<Self::Noise>;

    fn optional(&mut self, name: &'static str, tensor: PaceTensor) -> Result<Option<Self::Tensor>> {
        present(tensor).map(|tensor| self.input(name, tensor)).transpose()
    }

    fn optional_output(&mut self, name: &'static str, tensor: PaceTensor) -> Result<Option<Self::TensorMut>> {
        present(tensor).map(|tensor| self.output(name, tensor)).transpose()
    }

    fn base(&mut self, weight: PaceTensor, bias: PaceTensor) -> Result<Option<Base<Self::Tensor>>> {
        match (self.optional("base_weight", weight)?, self.optional("base_bias", bias)?) {
            (Some(weight), bias) => Ok(Some(Base { weight, bias })),
            (None, None) => Ok(None),
            (None, Some(_)) => Err(Failure::argument("base_bias", "is given without a `base_weight`")),
        }
    }
}

/// Device memory; plans check it.
pub(super) struct OnDevice;

impl Memory for OnDevice {
    type Tensor = Buffer;
    type TensorMut = Buffer;
    type Noise = Source;

    fn input(&mut self, _: &'static str, tensor: PaceTensor) -> Result<Buffer> {
        Ok(buffer(tensor))
    }

    fn output(&mut self, _: &'static str, tensor: PaceTensor) -> Result<Buffer> {
        Ok(buffer(tensor))
    }

    fn noise(&mut self, noise: &PaceNoise) -> Result<Source> {
        match noise.kind {
            PACE_NOISE_OFF => Ok(Source::Off),
            PACE_NOISE_GENERATED => {
                let generator = generator(noise, key(noise.key))?;
                Ok(match key_buffer(noise.key_address) {
                    Some(key) => Source::Keyed { generator, key },
                    None => Source::Generated(generator),
                })
            }
            PACE_NOISE_GIVEN => Ok(Source::Given { z: buffer(noise.z), shape: noise_shape(noise)? }),
            other => Err(bad_kind(other)),
        }
    }
}

/// The caller's host memory; tensors of an operator have elements `T`. Slices come out checked: not null, aligned, inside the
/// address space, and no output shares memory with anything else.
pub(super) struct Host<'a, T> {
    inputs: Vec<(&'static str, Range<usize>)>,
    outputs: Vec<(&'static str, Range<usize>)>,
    memory: PhantomData<&'a mut T>,
}

impl<'a, T: Element> Memory for Host<'a, T> {
    type Tensor = &'a [T];
    type TensorMut = &'a mut [T];
    type Noise = Noise<&'a [T::Real]>;

    fn input(&mut self, name: &'static str, tensor: PaceTensor) -> Result<&'a [T]> {
        self.slice(name, tensor)
    }

    fn output(&mut self, name: &'static str, tensor: PaceTensor) -> Result<&'a mut [T]> {
        self.slice_mut(name, tensor)
    }

    fn noise(&mut self, noise: &PaceNoise) -> Result<Noise<&'a [T::Real]>> {
        match noise.kind {
            PACE_NOISE_OFF => Ok(Noise::Off),
            PACE_NOISE_GENERATED => {
                let key = self.key(noise.key, noise.key_address)?;
                Ok(Noise::Generated(generator(noise, key)?))
            }
            PACE_NOISE_GIVEN => Ok(Noise::Given { z: self.slice("z", noise.z)?, shape: noise_shape(noise)? }),
            other => Err(bad_kind(other)),
        }
    }
}

impl<'a, T> Host<'a, T> {
    /// # Safety
    /// Every tensor that comes to the methods is absent, or memory of its length that stays for `'a`, an input initialised, and
    /// that nothing else touches in conflict.
    pub(super) unsafe fn new() -> Self {
        Self { inputs: Vec::new(), outputs: Vec::new(), memory: PhantomData }
    }

    /// The addresses of a present tensor, and its length.
    fn range<E>(name: &'static str, tensor: PaceTensor) -> Result<(Range<usize>, usize)> {
        let start = tensor.data as usize;
        if start == 0 {
            return Err(Failure::argument(name, "is a null pointer"));
        }
        if !start.is_multiple_of(align_of::<E>()) {
            return Err(Failure::argument(name, "does not start at a multiple of its element size"));
        }
        let bytes = usize::try_from(tensor.len).ok().and_then(|len| len.checked_mul(size_of::<E>()));
        let bytes = bytes.filter(|&bytes| bytes <= isize::MAX as usize);
        match bytes.and_then(|bytes| start.checked_add(bytes)) {
            Some(end) => Ok((start..end, tensor.len as usize)),
            None => Err(Failure::argument(name, "reaches past the end of the address space")),
        }
    }

    fn overlap(range: &Range<usize>, others: &[(&'static str, Range<usize>)]) -> Option<&'static str> {
        let hit = others.iter().find(|(_, other)| range.start.max(other.start) < range.end.min(other.end));
        hit.map(|&(name, _)| name)
    }

    /// A tensor of any elements that is read.
    pub(super) fn slice<E>(&mut self, name: &'static str, tensor: PaceTensor) -> Result<&'a [E]> {
        let (range, len) = Self::range::<E>(name, tensor)?;
        if let Some(output) = Self::overlap(&range, &self.outputs) {
            return Err(Failure::argument(name, &format!("overlaps the output `{output}`")));
        }
        self.inputs.push((name, range));
        // SAFETY: not null, aligned, no larger than the address space, apart from what was given out to be written; the rest was
        // promised to `new`.
        Ok(unsafe { std::slice::from_raw_parts(tensor.data.cast(), len) })
    }

    /// A tensor of any elements that is written.
    pub(super) fn slice_mut<E>(&mut self, name: &'static str, tensor: PaceTensor) -> Result<&'a mut [E]> {
        let (range, len) = Self::range::<E>(name, tensor)?;
        if let Some(other) = Self::overlap(&range, &self.outputs).or(Self::overlap(&range, &self.inputs)) {
            return Err(Failure::argument(name, &format!("is an output and overlaps `{other}`")));
        }
        self.outputs.push((name, range));
        // SAFETY: not null, aligned, no larger than the address space, apart from all other slices; the rest was promised to
        // `new`.
        Ok(unsafe { std::slice::from_raw_parts_mut(tensor.data.cast(), len) })
    }

    /// The key, from wherever it is.
    pub(super) fn key(&mut self, value: u64, address: *const u64) -> Result<Key> {
        if address.is_null() {
            return Ok(key(value));
        }
        let tensor = PaceTensor { data: address.cast_mut().cast(), len: 1 };
        let value: &[u64] = self.slice("key_address", tensor)?;
        Ok(key(value[0]))
    }
}

/// A tensor that may be absent.
pub(super) fn present(tensor: PaceTensor) -> Option<PaceTensor> {
    (!tensor.data.is_null() || tensor.len > 0).then_some(tensor)
}

/// A tensor in device memory; plans check it.
pub(super) fn buffer(tensor: PaceTensor) -> Buffer {
    // A length that does not fit is no length of a tensor either: plans compare it with what they expect.
    Buffer { address: tensor.data as u64, len: usize::try_from(tensor.len).unwrap_or(usize::MAX) }
}

pub(super) fn optional_buffer(tensor: PaceTensor) -> Option<Buffer> {
    present(tensor).map(buffer)
}

/// A workspace, whose length is in bytes, in elements of `bytes` bytes, of which the operator needs `needed`.
pub(super) fn workspace_buffer(tensor: PaceTensor, bytes: usize, needed: usize) -> Result<Buffer> {
    let buffer = buffer(tensor);
    let needed = needed.saturating_mul(bytes);
    if buffer.len < needed {
        let text = format!(
            "`workspace` has {} bytes, expected at least {needed}: ask the operator's query",
            buffer.len
        );
        return Err(Failure::new(PACE_ERROR_LENGTH, text));
    }
    Ok(Buffer { len: buffer.len / bytes, ..buffer })
}

/// Rejects a factor of 0, which almost always means that the field was not set.
pub(super) fn check_scale(scale: f64) -> Result<f64> {
    match scale {
        0.0 => Err(Failure::new(
            PACE_ERROR_VALUE,
            "`scale` is 0, which switches the adapter off; the paper's is 1",
        )),
        scale => Ok(scale),
    }
}

pub(super) fn key_buffer(address: *const u64) -> Option<Buffer> {
    (!address.is_null()).then_some(Buffer { address: address as u64, len: 1 })
}
