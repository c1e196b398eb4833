//! Images: the two data sets shipped with the example, folders of images, few-shot splits and augmentation.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use flate2::read::GzDecoder;
use image::imageops::{self, FilterType};
use image::{DynamicImage, ImageBuffer, ImageDecoder, ImageReader, Luma};
use pace_kernels::noise::philox4x32_10;
use rayon::prelude::*;

/// What can be wrong with a folder of images, or with a split of them.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{path}: {error}")]
    Io { path: PathBuf, error: std::io::Error },
    #[error("{path}: {error}")]
    Image { path: PathBuf, error: image::ImageError },
    #[error("{path}: not a .png, .jpg or .jpeg file")]
    FileType { path: PathBuf },
    #[error("{path}: no sub-folders, expected one per class")]
    NoClasses { path: PathBuf },
    #[error("{path}: no images in this class")]
    NoImages { path: PathBuf },
    #[error("cannot load images of {0} channels, only 1 (grey) or 3 (red, green, blue)")]
    Channels(usize),
    #[error(
        "class {class} has {images} images, too few for {shots} to train on, {validation} to validate on \
         and at least one to test on"
    )]
    TooFewImages { class: usize, images: usize, shots: usize, validation: usize },
}

pub type Result<T> = std::result::Result<T, Error>;

/// Images of one size with their classes.
pub struct Images {
    /// `[n, channels, height, width]`, row-major, from 0 to 1.
    pub pixels: Vec<f32>,
    /// One class per image, below `classes`.
    pub labels: Vec<u32>,
    pub channels: usize,
    pub height: usize,
    pub width: usize,
    pub classes: usize,
    pub class_names: Vec<String>,
}

impl Images {
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// The pixels of image `i`, `[channels, height, width]`.
    pub fn image(&self, i: usize) -> &[f32] {
        let size = self.channels * self.height * self.width;
        &self.pixels[i * size..][..size]
    }

    /// The images at `indices`, in that order.
    pub fn subset(&self, indices: &[usize]) -> Self {
        Self {
            pixels: indices.iter().flat_map(|&i| self.image(i)).copied().collect(),
            labels: indices.iter().map(|&i| self.labels[i]).collect(),
            class_names: self.class_names.clone(),
            ..*self
        }
    }
}

/// Height and width of MNIST's images, and of the box in their middle that the digit fills.
const MNIST_SIDE: usize = 28;
const MNIST_BOX: usize = 20;

/// 5,000 digits of MNIST, 500 per class; `[1, 28, 28]`.
pub fn load_mnist() -> Images {
    let ([n, height, width], pixels) = idx(include_bytes!("data/mnist-5k-images-idx3-ubyte.gz"));
    let ([labels_n], labels) = idx(include_bytes!("data/mnist-5k-labels-idx1-ubyte.gz"));
    assert_eq!((n, height, width), (labels_n, MNIST_SIDE, MNIST_SIDE));
    digits(pixels.iter().map(|&v| f32::from(v) / 255.0).collect(), labels)
}

/// The 1,797 digits of Optdigits' test set, enlarged from 8×8 to the format of MNIST: 20×20 by bicubic (Catmull–Rom)
/// interpolation, in the middle of 28×28; `[1, 28, 28]`.
pub fn load_optdigits() -> Images {
    let ([n, height, width], pixels) = idx(include_bytes!("data/optdigits-images-idx3-ubyte.gz"));
    let ([labels_n], labels) = idx(include_bytes!("data/optdigits-labels-idx1-ubyte.gz"));
    assert_eq!(n, labels_n);
    let pixels = pixels
        .chunks_exact(height * width)
        .flat_map(|image| {
            let small = image.iter().map(|&v| f32::from(v) / 16.0).collect();
            let small = ImageBuffer::<Luma<f32>, Vec<f32>>::from_raw(width as u32, height as u32, small)
                .expect("the chunk has height × width pixels");
            let large = imageops::resize(&small, MNIST_BOX as u32, MNIST_BOX as u32, FilterType::CatmullRom);
            let margin = (MNIST_SIDE - MNIST_BOX) / 2;
            let mut padded = vec![0.0; MNIST_SIDE * MNIST_SIDE];
            for (y, row) in large.as_raw().chunks_exact(MNIST_BOX).enumerate() {
                padded[(y + margin) * MNIST_SIDE + margin..][..MNIST_BOX].copy_from_slice(row);
            }
            padded
        })
        .collect();
    digits(pixels, labels)
}

fn digits(pixels: Vec<f32>, labels: Vec<u8>) -> Images {
    Images {
        pixels,
        labels: labels.into_iter().map(u32::from).collect(),
        channels: 1,
        height: MNIST_SIDE,
        width: MNIST_SIDE,
        classes: 10,
        class_names: (0..10).map(|digit| digit.to_string()).collect(),
    }
}

/// Sizes and values of a gzip'ed IDX file of bytes. The files are part of the program: a broken one is a bug.
fn idx<const RANK: usize>(packed: &[u8]) -> ([usize; RANK], Vec<u8>) {
    let mut bytes = Vec::new();
    GzDecoder::new(packed).read_to_end(&mut bytes).expect("an embedded file is gzip'ed");
    let (magic, rest) = bytes.split_at(4);
    assert_eq!(magic, [0, 0, 8, RANK as u8], "an embedded file is IDX, bytes, of rank {RANK}");
    let (sizes, values) = rest.split_at(4 * RANK);
    let sizes: [usize; RANK] = std::array::from_fn(|i| {
        u32::from_be_bytes(sizes[4 * i..][..4].try_into().expect("four bytes")) as usize
    });
    assert_eq!(values.len(), sizes.iter().product::<usize>(), "an embedded file is whole");
    (sizes, values.to_vec())
}

/// Loads `folder/class/image.{png,jpg,jpeg}`: every sub-folder is a class, in order of their names.
///
/// Images are turned as their EXIF orientation says, stretched to `size` × `size`, and made grey (`channels` = 1) or
/// RGB (`channels` = 3); transparency is dropped. Names that begin with a dot are skipped; any other file in a class
/// that is not an image is an error, so that no image goes missing unnoticed.
pub fn load_folder(folder: &Path, size: usize, channels: usize) -> Result<Images> {
    if !matches!(channels, 1 | 3) {
        return Err(Error::Channels(channels));
    }
    let classes: Vec<_> = sorted_entries(folder)?.into_iter().filter(|path| path.is_dir()).collect();
    if classes.is_empty() {
        return Err(Error::NoClasses { path: folder.into() });
    }
    let mut files = Vec::new();
    for (label, class) in classes.iter().enumerate() {
        let paths = sorted_entries(class)?;
        if paths.is_empty() {
            return Err(Error::NoImages { path: class.clone() });
        }
        files.extend(paths.into_iter().map(|path| (path, label as u32)));
    }
    let pixels: Vec<_> =
        files.par_iter().map(|(path, _)| load_image(path, size, channels)).collect::<Result<_>>()?;
    Ok(Images {
        pixels: pixels.concat(),
        labels: files.iter().map(|&(_, label)| label).collect(),
        channels,
        height: size,
        width: size,
        classes: classes.len(),
        class_names: classes.iter().map(|path| name(path)).collect(),
    })
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn sorted_entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let io = |error| Error::Io { path: folder.into(), error };
    let mut paths = fs::read_dir(folder)
        .map_err(io)?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<std::io::Result<Vec<_>>>()
        .map_err(io)?;
    paths.retain(|path| !name(path).starts_with('.'));
    paths.sort();
    Ok(paths)
}

/// `[channels, size, size]`.
fn load_image(path: &Path, size: usize, channels: usize) -> Result<Vec<f32>> {
    let extension = path.extension().unwrap_or_default().to_ascii_lowercase();
    if !["png", "jpg", "jpeg"].iter().any(|known| extension == *known) {
        return Err(Error::FileType { path: path.into() });
    }
    let decode = || {
        let mut decoder = ImageReader::open(path)?.with_guessed_format()?.into_decoder()?;
        let orientation = decoder.orientation()?;
        let mut image = DynamicImage::from_decoder(decoder)?;
        image.apply_orientation(orientation);
        Ok(image)
    };
    let image = decode().map_err(|error| Error::Image { path: path.into(), error })?;
    let image = image.resize_exact(size as u32, size as u32, FilterType::CatmullRom);
    let bytes = if channels == 1 { image.into_luma8().into_raw() } else { image.into_rgb8().into_raw() };
    // The decoder interleaves the channels; the model wants one plane after the other.
    Ok((0..channels)
        .flat_map(|channel| bytes.iter().skip(channel).step_by(channels))
        .map(|&v| f32::from(v) / 255.0)
        .collect())
}

/// Random numbers that depend on the arguments of [`Random::new`] alone: the same on every machine, and with every
/// version of the dependencies.
pub struct Random {
    key: [u32; 2],
    counter: [u32; 4],
    words: [u32; 4],
    used: usize,
}

impl Random {
    /// Number `item` of the streams for one `purpose` under `seed`.
    pub fn new(seed: u64, purpose: u32, item: u32) -> Self {
        const TAG: u32 = 0x4441_5441; // "DATA": apart from the training noise, which may use the same seed.
        Self {
            key: [seed as u32, (seed >> 32) as u32],
            counter: [0, item, purpose, TAG],
            words: [0; 4],
            used: 4,
        }
    }

    fn word(&mut self) -> u32 {
        if self.used == 4 {
            self.words = philox4x32_10(self.counter, self.key);
            self.counter[0] += 1;
            self.used = 0;
        }
        self.used += 1;
        self.words[self.used - 1]
    }

    /// Uniform in `0..n`; with 64 random bits the unevenness for an `n` that is no power of two is nothing.
    fn below(&mut self, n: usize) -> usize {
        let bits = u64::from(self.word()) << 32 | u64::from(self.word());
        ((u128::from(bits) * n as u128) >> 64) as usize
    }

    /// Uniform between `low` and `high`.
    pub fn uniform(&mut self, low: f32, high: f32) -> f32 {
        let unit = (self.word() >> 8) as f32 / (1 << 24) as f32;
        unit.mul_add(high - low, low)
    }

    /// Puts `items` in random order (Fisher–Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}

/// The purposes of this module's random numbers.
const SPLIT: u32 = 1;
const AUGMENT: u32 = 2;

/// Indices of the images to train, validate and test on, sorted by class.
#[derive(Debug, PartialEq)]
pub struct Split {
    pub train: Vec<usize>,
    pub validation: Vec<usize>,
    pub test: Vec<usize>,
}

/// Draws `shots` images per class to train on and `validation_per_class` to validate on; the rest is for testing.
///
/// Under one seed every number of shots has the same validation images, and more shots contain the fewer.
pub fn few_shot_split(
    labels: &[u32],
    classes: usize,
    shots: usize,
    validation_per_class: usize,
    seed: u64,
) -> Result<Split> {
    let mut split = Split { train: Vec::new(), validation: Vec::new(), test: Vec::new() };
    for class in 0..classes {
        let mut images: Vec<_> = (0..labels.len()).filter(|&i| labels[i] as usize == class).collect();
        if images.len() <= shots + validation_per_class {
            return Err(Error::TooFewImages {
                class,
                images: images.len(),
                shots,
                validation: validation_per_class,
            });
        }
        Random::new(seed, SPLIT, class as u32).shuffle(&mut images);
        let (validation, rest) = images.split_at(validation_per_class);
        let (train, test) = rest.split_at(shots);
        split.validation.extend(validation);
        split.train.extend(train);
        split.test.extend(test);
    }
    Ok(split)
}

/// The image `[channels, height, width]` turned by up to 15°, sheared by up to 0.15, scaled by 0.85 to 1.15 and
/// shifted by up to 2 pixels, all around its middle and drawn from `seed`; bilinear, zero outside the image.
pub fn augment_affine(image: &[f32], height: usize, width: usize, channels: usize, seed: u64) -> Vec<f32> {
    let mut random = Random::new(seed, AUGMENT, 0);
    let angle = random.uniform(-15f32, 15.0).to_radians();
    let shear = random.uniform(-0.15, 0.15);
    let scale = random.uniform(0.85, 1.15);
    let shift = (random.uniform(-2.0, 2.0), random.uniform(-2.0, 2.0));

    // The image moves by A = scale · rotation · shear; every new pixel looks up where it came from, by
    // A⁻¹ = shear⁻¹ · rotationᵀ / scale.
    let (sin, cos) = angle.sin_cos();
    let inverse = [
        [(cos + shear * sin) / scale, (sin - shear * cos) / scale], //
        [-sin / scale, cos / scale],
    ];
    let middle = ((width - 1) as f32 / 2.0, (height - 1) as f32 / 2.0);
    let mut out = Vec::with_capacity(image.len());
    for plane in image.chunks_exact(height * width).take(channels) {
        for y in 0..height {
            for x in 0..width {
                let dx = x as f32 - middle.0 - shift.0;
                let dy = y as f32 - middle.1 - shift.1;
                let from_x = inverse[0][0] * dx + inverse[0][1] * dy + middle.0;
                let from_y = inverse[1][0] * dx + inverse[1][1] * dy + middle.1;
                out.push(bilinear(plane, height, width, from_x, from_y));
            }
        }
    }
    out
}

fn bilinear(plane: &[f32], height: usize, width: usize, x: f32, y: f32) -> f32 {
    let (left, top) = (x.floor(), y.floor());
    let (right_weight, bottom_weight) = (x - left, y - top);
    let pixel = |x: f32, y: f32| {
        let inside = x >= 0.0 && y >= 0.0 && x < width as f32 && y < height as f32;
        if inside { plane[y as usize * width + x as usize] } else { 0.0 }
    };
    let row = |y| (1.0 - right_weight) * pixel(left, y) + right_weight * pixel(left + 1.0, y);
    (1.0 - bottom_weight) * row(top) + bottom_weight * row(top + 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An empty folder that is removed at the end of the test.
    struct Folder(PathBuf);

    impl Folder {
        fn new(test: &str) -> Self {
            let path = std::env::temp_dir().join(format!("few_shot_{test}_{}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }

        fn class(&self, name: &str) -> PathBuf {
            let path = self.0.join(name);
            fs::create_dir_all(&path).unwrap();
            path
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn counts(images: &Images) -> Vec<usize> {
        (0..images.classes as u32)
            .map(|class| images.labels.iter().filter(|&&label| label == class).count())
            .collect()
    }

    #[test]
    fn mnist_is_whole() {
        let mnist = load_mnist();
        assert_eq!((mnist.len(), mnist.channels, mnist.height, mnist.width), (5000, 1, 28, 28));
        assert_eq!(counts(&mnist), [500; 10]);
        assert_eq!(mnist.class_names.len(), mnist.classes);
        assert!(mnist.pixels.iter().all(|v| (0.0..=1.0).contains(v)));
        assert!(mnist.pixels.contains(&1.0));
    }

    #[test]
    fn optdigits_look_like_mnist() {
        let digits = load_optdigits();
        assert_eq!((digits.len(), digits.channels, digits.height, digits.width), (1797, 1, 28, 28));
        assert_eq!(counts(&digits), [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]);
        assert!(digits.pixels.iter().all(|v| (0.0..=1.0).contains(v)));
        let mean = |images: &Images| images.pixels.iter().sum::<f32>() / images.pixels.len() as f32;
        let ratio = mean(&digits) / mean(&load_mnist());
        assert!((0.5..2.0).contains(&ratio), "brightness against MNIST: {ratio}");
        // Nothing in the margin, ink in the middle.
        for image in (0..digits.len()).map(|i| digits.image(i)) {
            let ink = |inside: bool| -> f32 {
                (0..28 * 28)
                    .filter(|i| inside == ((4..24).contains(&(i / 28)) && (4..24).contains(&(i % 28))))
                    .map(|i| image[i])
                    .sum()
            };
            assert_eq!(ink(false), 0.0);
            assert!(ink(true) > 10.0);
        }
    }

    /// The first digit against the same interpolation by hand: at scale 2.5, column 2 reads position 0.5.
    #[test]
    fn optdigits_are_enlarged_by_catmull_rom() {
        let ([_, 8, 8], raw) = idx(include_bytes!("data/optdigits-images-idx3-ubyte.gz")) else {
            panic!("8×8")
        };
        let cubic = |d: f32| match d.abs() {
            d if d < 1.0 => 1.5 * d * d * d - 2.5 * d * d + 1.0,
            d if d < 2.0 => -0.5 * d * d * d + 2.5 * d * d - 4.0 * d + 2.0,
            _ => 0.0,
        };
        let digits = load_optdigits();
        for (y, x) in [(10, 10), (7, 12), (9, 6)] {
            let mut sum = 0.0;
            let mut weights = 0.0;
            for (i, &v) in raw[..64].iter().enumerate() {
                let source = |out: usize| (out as f32 + 0.5) / 2.5 - 0.5;
                let weight = cubic((i / 8) as f32 - source(y)) * cubic((i % 8) as f32 - source(x));
                sum += weight * f32::from(v) / 16.0;
                weights += weight;
            }
            let got = digits.image(0)[(y + 4) * 28 + x + 4];
            assert!((got - (sum / weights).clamp(0.0, 1.0)).abs() < 1e-5, "({y}, {x}): {got}");
        }
    }

    #[test]
    fn subset_keeps_order() {
        let mnist = load_mnist();
        let subset = mnist.subset(&[7, 3]);
        assert_eq!(subset.labels, [mnist.labels[7], mnist.labels[3]]);
        assert_eq!(subset.image(1), mnist.image(3));
        assert_eq!((subset.len(), subset.classes), (2, 10));
    }

    #[test]
    fn folder_is_loaded_by_class() {
        let folder = Folder::new("by_class");
        let (second, first) = (folder.class("b"), folder.class("a"));
        image::RgbImage::from_pixel(5, 9, image::Rgb([255, 0, 51])).save(first.join("2.PNG")).unwrap();
        image::RgbImage::from_pixel(3, 3, image::Rgb([0, 255, 0])).save(first.join("1.png")).unwrap();
        image::GrayImage::from_pixel(8, 8, Luma([128])).save(second.join("x.jpeg")).unwrap();
        fs::write(second.join(".hidden"), "").unwrap();

        let images = load_folder(&folder.0, 4, 3).unwrap();
        assert_eq!((images.len(), images.channels, images.height, images.width), (3, 3, 4, 4));
        assert_eq!(images.labels, [0, 0, 1]);
        assert_eq!(images.class_names, ["a", "b"]);
        let planes = |i: usize| images.image(i).chunks_exact(16).map(<[f32]>::to_vec).collect::<Vec<_>>();
        assert_eq!(planes(0), [vec![0.0; 16], vec![1.0; 16], vec![0.0; 16]]);
        assert_eq!(planes(1), [vec![1.0; 16], vec![0.0; 16], vec![0.2; 16]]);
        assert!(images.image(2).iter().all(|v| (v - 128.0 / 255.0).abs() < 0.02));
        assert_eq!(load_folder(&folder.0, 4, 1).unwrap().pixels.len(), 3 * 16);
    }

    #[test]
    fn folder_errors_name_the_file() {
        let message = |path: &Path| load_folder(path, 4, 3).err().unwrap().to_string();
        let folder = Folder::new("errors");
        assert!(message(&folder.0.join("missing")).contains("missing"));
        assert!(message(&folder.0).contains("no sub-folders"));
        let class = folder.class("a");
        assert!(message(&folder.0).contains("no images"));
        fs::write(class.join("notes.txt"), "").unwrap();
        assert!(message(&folder.0).contains("notes.txt: not a .png"));
        fs::rename(class.join("notes.txt"), class.join("broken.png")).unwrap();
        assert!(message(&folder.0).contains("broken.png"));
        assert!(load_folder(&folder.0, 4, 2).err().unwrap().to_string().contains("2 channels"));
    }

    #[test]
    fn splits_are_disjoint_and_repeatable() {
        let labels = load_optdigits().labels;
        let split = |shots, seed| few_shot_split(&labels, 10, shots, 5, seed).unwrap();
        let four = split(4, 1);
        assert_eq!((four.train.len(), four.validation.len()), (40, 50));
        for class in 0..10 {
            assert_eq!(four.train.iter().filter(|&&i| labels[i] == class).count(), 4);
            assert_eq!(four.validation.iter().filter(|&&i| labels[i] == class).count(), 5);
        }
        let mut all = [&four.train[..], &four.validation, &four.test].concat();
        all.sort();
        assert!(all.into_iter().eq(0..labels.len()));

        assert_eq!(four, split(4, 1));
        assert_ne!(four.train, split(4, 2).train);
        let eight = split(8, 1);
        assert_eq!(eight.validation, four.validation);
        assert!(four.train.iter().all(|i| eight.train.contains(i)));
    }

    /// The values come from the same arithmetic in Python.
    #[test]
    fn split_is_pinned() {
        let split = few_shot_split(&load_optdigits().labels, 10, 1, 0, 0).unwrap();
        assert_eq!(split.train, [1317, 235, 1272, 999, 247, 1447, 882, 61, 414, 1580]);
    }

    #[test]
    fn too_few_images_are_an_error() {
        let error = few_shot_split(&[0, 0, 0, 1, 1], 2, 1, 1, 0).unwrap_err();
        assert!(error.to_string().starts_with("class 1 has 2 images, too few for 1 to train on"), "{error}");
    }

    #[test]
    fn shuffles_are_fair() {
        let mut seen = [0u32; 6];
        for seed in 0..6000 {
            let mut order = [0, 1, 2];
            Random::new(seed, 9, 0).shuffle(&mut order);
            seen[order[0] * 2 + usize::from(order[1] > order[2])] += 1;
        }
        // 1000 ± 6 standard deviations.
        assert!(seen.iter().all(|n| (827..1173).contains(n)), "{seen:?}");
    }

    #[test]
    fn augmentation_moves_the_image_a_little() {
        let mnist = load_mnist();
        let (mut changed, mut ink) = (0, 0.0);
        for i in 0..500 {
            let image = mnist.image(i * 10);
            let moved = augment_affine(image, 28, 28, 1, i as u64);
            assert_eq!(moved, augment_affine(image, 28, 28, 1, i as u64));
            assert!(moved.iter().all(|v| (0.0..=1.0).contains(v)));
            changed += usize::from(moved != image);
            ink += moved.iter().sum::<f32>() / image.iter().sum::<f32>();
        }
        assert_eq!(changed, 500);
        assert!((0.9..1.1).contains(&(ink / 500.0)), "{}", ink / 500.0);
    }

    /// A plane `a + b·x + c·y` is what bilinear interpolation reproduces, so inside the image the result is the plane
    /// again, with a gradient turned and scaled within the bounds.
    #[test]
    fn augmentation_is_affine() {
        let side = 40;
        let plane: Vec<f32> = (0..side * side).map(|i| (i % side) as f32).collect();
        let both: Vec<f32> = plane.iter().chain(&plane).copied().collect();
        for seed in 0..20 {
            let moved = augment_affine(&both, side, side, 2, seed);
            assert_eq!(moved[..side * side], moved[side * side..]);
            let at = |x: usize, y: usize| moved[y * side + x];
            let (dx, dy) = (at(21, 20) - at(20, 20), at(20, 21) - at(20, 20));
            assert!((at(25, 12) - at(20, 20) - 5.0 * dx + 8.0 * dy).abs() < 1e-3);
            assert!((0.79..1.22).contains(&dx) && dy.abs() < 0.49, "{dx} {dy}");
        }
    }
}
