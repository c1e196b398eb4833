//! Right calls give what the Rust interface gives; errors, devices and the functions that are no operators.

use crate::support::*;
use pace_kernels::capi::*;
use pace_kernels::noise::{Key, Noise};
use pace_kernels::{LinearShape, cpu};
use std::ptr::{null, null_mut};

const SHAPE: LinearShape =
    LinearShape { branches: 2, batch: 2, tokens: 3, in_features: 5, out_features: 4, shared_input: true };

#[test]
fn a_layer_gives_what_the_rust_interface_gives() {
    let mut random = Random::new(1);
    let [mut weight, mut bias, mut delta, mut x, mut dy] = [20, 4, 20, 30, 48].map(|len| random.floats(len));
    let layer = cpu::NoisyLinear {
        shape: SHAPE,
        noise: Noise::Generated(generator()),
        base: Some(cpu::Base { weight: &weight.clone(), bias: Some(&bias.clone()) }),
        delta_weight: Some(&delta.clone()),
        delta_bias: None,
        fold: true,
    };
    let (mut y, mut dx, mut dw) = (vec![0.0; 48], vec![0.0; 30], vec![0.0; 20]);
    layer.forward(&x, &mut y).unwrap();
    let grads: cpu::NoisyLinearGrads<&mut [_]> =
        cpu::NoisyLinearGrads { input: Some(&mut dx), delta_weight: Some(&mut dw), delta_bias: None };
    layer.backward(&x, &dy, grads).unwrap();

    let (mut y2, mut dx2, mut dw2) = (vec![f32::NAN; 48], vec![f32::NAN; 30], vec![f32::NAN; 20]);
    // The key from memory stands before the one in the struct.
    let key = pace_key(1, 2, 3);
    let args = PaceNoisyLinear {
        shape: shape(),
        noise: PaceNoise { key: 0, key_address: &key, ..noise() },
        base_weight: tensor(&mut weight),
        base_bias: tensor(&mut bias),
        delta_weight: tensor(&mut delta),
        x: tensor(&mut x),
        y: tensor(&mut y2),
        dy: tensor(&mut dy),
        grad_input: tensor(&mut dx2),
        grad_delta_weight: tensor(&mut dw2),
        ..zeroed()
    };
    // SAFETY: all tensors are live and of their length.
    unsafe {
        assert_eq!(pace_noisy_linear_forward(null(), null_mut(), &args), PACE_OK, "{}", message());
        assert_eq!(pace_noisy_linear_backward(null(), null_mut(), &args), PACE_OK, "{}", message());
    }
    assert_eq!((y, dx, dw), (y2, dx2, dw2));
}

#[test]
fn noise_is_that_of_the_generator() {
    let mut z = vec![0f64; 16];
    let args =
        PaceNoiseFill { dtype: PACE_F64, shape: shape(), noise: noise(), z: tensor(&mut z), ..zeroed() };
    // SAFETY: all tensors are live and of their length.
    assert_eq!(unsafe { pace_noise_fill(null(), null_mut(), &args) }, PACE_OK, "{}", message());
    for (row, z) in z.chunks(4).enumerate() {
        let mut expected = [0f64; 4];
        generator().fill(row as u8 / 2, row as u64 % 2, 0, 0, &mut expected);
        assert_eq!(z, expected);
    }
}

#[test]
fn errors_belong_to_their_thread() {
    // SAFETY: null arguments are allowed.
    assert_eq!(unsafe { pace_merge(null(), null_mut(), null()) }, PACE_ERROR_ARGUMENT);
    let before = message();
    std::thread::spawn(|| {
        assert_eq!(message(), "");
        // SAFETY: a null place is allowed.
        assert_eq!(unsafe { pace_sigma_by_block(3, -1.0, 0, null_mut()) }, PACE_ERROR_VALUE);
        assert!(message().contains("sigma"));
    })
    .join()
    .unwrap();
    assert_eq!(message(), before);
}

#[test]
fn a_device_that_is_not_there_is_an_error_and_null() {
    let mut device = std::ptr::dangling_mut::<PaceDevice>();
    // SAFETY: a place for a pointer; and null.
    unsafe {
        let status = pace_device_open(u32::MAX, &mut device);
        assert!(status >= PACE_ERROR_NO_DRIVER && device.is_null(), "{}", message());
        assert_eq!(pace_device_open(0, null_mut()), PACE_ERROR_ARGUMENT);
        pace_device_close(null_mut());
    }
}

#[test]
fn small_functions() {
    assert_eq!(pace_abi_version(), PACE_ABI_VERSION);
    assert_eq!(pace_key(1, 2, 3), u64::from(Key::derive(1, 2, 3)));
    let mut sigmas = [0.0; 4];
    // SAFETY: room for four numbers; masks of their length; nine words.
    unsafe {
        assert_eq!(pace_sigma_by_block(4, 1.2, 1, sigmas.as_mut_ptr()), PACE_OK);
        assert_eq!(sigmas.to_vec(), pace_kernels::schedule::sigma_by_block(4, 1.2, 1).unwrap());
        let (mut mask, mut expected) = ([9f32; 40], [0f32; 40]);
        assert_eq!(pace_drop_path_mask(PACE_F32, 5, 0.4, 7, tensor(&mut mask)), PACE_OK);
        pace_kernels::noise::drop_path_mask(Key([5, 0]), 0.4, 7, &mut expected).unwrap();
        assert_eq!(mask, expected);
        assert_eq!(pace_drop_path_mask(PACE_F16, 5, 0.4, 7, tensor(&mut mask)), PACE_ERROR_DTYPE);
        assert_eq!(pace_loss_status([0; 9].as_ptr(), 3, 0), PACE_OK);
        assert_eq!(pace_loss_status([1, 2, 9, 0, 0, 0, 0, 0, 0].as_ptr(), 3, 0), PACE_ERROR_LABEL);
        assert_eq!(message(), "`labels[2]` is 9, expected 0 to 2 or the ignored label");
        assert_eq!(pace_loss_status(null(), 3, 0), PACE_ERROR_ARGUMENT);
    }
}
