//! Super-networks on a GPU, or on the emulator that takes its place: against PyTorch + PEFT, and the whole server.

use crate::cli::process::{Server, lonas};
use crate::dtypes;
use crate::golden::{self, Supernet};
use crate::logits::{Cases, NETS, run};
use crate::tiny::{NAME, OTHER, Tiny};
use lonas::backend::cuda::{Cuda, KvDtype};
use serde_json::{Value, json};

#[test]
fn logits_are_those_of_pytorch_to_the_rounding_of_weights() {
    dtypes::check("bf16 on a GPU", || Cuda::open(0).unwrap().with_kv(KvDtype::F32), dtypes::BF16_ERROR);
}

#[test]
fn logits_are_the_same_bit_for_bit_however_a_prompt_was_cut() {
    for (base, name) in NETS {
        let net = Supernet::open(base, name);
        let Cases { tokens, cases } = golden::json(&format!("{name}/cases.json"));
        let on_gpu = |chunk| run(&net, Cuda::open(0).unwrap(), &tokens, &cases, chunk);
        assert!(on_gpu(5) == on_gpu(100), "{name}: chunks of 5 differ");
    }
}

/// The log-probabilities of the likeliest first tokens of an answer.
fn first_tokens(server: &Server, model: &str) -> serde_json::Map<String, Value> {
    let request =
        json!({"model": model, "prompt": "the end of it", "max_tokens": 4, "temperature": 0, "logprobs": 5});
    let (head, body) = server.post("/v1/completions", &request);
    assert!(head.starts_with("HTTP/1.1 200"), "{head} {body}");
    let answer: Value = serde_json::from_str(&body).unwrap();
    answer["choices"][0]["logprobs"]["top_logprobs"][0].as_object().unwrap().clone()
}

#[test]
fn the_server_answers_for_every_sub_network_as_on_the_processor() {
    let tiny = Tiny::write();
    let folders = [NAME, OTHER].map(|name| tiny.model(name));
    let [one, other] = [0, 1].map(|i| folders[i].to_str().unwrap());
    let start = |device: &str| Server::start(&[one, other, "--device", device, "--kv-tokens", "512"]);
    let (gpu, processor) = (start("cuda"), start("cpu"));
    for model in ["tiny-tied:maximal", "tiny-tied:minimal", "tiny-other:heuristic"] {
        let [ours, theirs] = [&gpu, &processor].map(|server| first_tokens(server, model));
        let common =
            ours.iter().filter_map(|(token, value)| Some((value.as_f64()?, theirs.get(token)?.as_f64()?)));
        let offs = common.map(|(a, b)| (a - b).abs()).collect::<Vec<_>>();
        assert!(offs.len() >= 4 && offs.iter().all(|off| *off < 0.05), "{model}: {ours:?}, not {theirs:?}");
    }
    let (_, metrics) = gpu.get("/metrics");
    assert!(metrics.contains("device=\"cuda\",dtype=\"bf16\""), "{metrics}");
}

#[test]
fn bench_sets_its_rates_beside_what_the_gpu_can_do() {
    let tiny = Tiny::write();
    let model = tiny.model(NAME);
    let quick =
        ["--rounds", "1", "--prompt", "20", "--output", "2", "--streams", "1", "--json", "--device", "cuda"];
    let output = lonas(&["bench", model.to_str().unwrap()]).args(quick).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()).collect::<Vec<_>>();
    assert!(lines.iter().all(|line| line["device"] == "cuda" && line["dtype"] == "bf16"), "{text}");
    let of = |test: &str| lines.iter().filter(|line| line["test"] == test).collect::<Vec<_>>();
    let limits = of("limits")[0];
    assert!(limits["read_bytes_per_second"]["median"].as_f64() > Some(0.0), "{limits}");
    assert!(limits["f32_flops"]["median"].as_f64() > Some(0.0) && limits["bf16_flops"].is_null(), "{limits}");
    assert_eq!((of("prefill").len(), of("mixed").len()), (3, 1));
}

#[test]
fn a_gpu_that_cannot_be_used_is_named_and_auto_takes_the_processor() {
    let tiny = Tiny::write();
    let model = tiny.model(NAME);
    let refused = |arguments: &[&str], environment: (&str, &str), why: &str| {
        let arguments = [&["serve", model.to_str().unwrap()], arguments].concat();
        let output = lonas(&arguments).env(environment.0, environment.1).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(1) && said.contains(why), "{arguments:?}: {said}");
    };
    let none = ("LD_LIBRARY_PATH", "");
    refused(&["--device", "cuda:7"], ("A", ""), "no GPU 7");
    refused(&["--device", "cuda", "--dtype", "int8"], ("A", ""), "--dtype int8");
    refused(&["--device", "cuda", "--kv-tokens", "99999999999"], ("A", ""), "key-value pool");
    // Without a driver; where a real one is installed beside the system's libraries, it is found all the same.
    if std::env::var_os("LONAS_EMULATED").is_some() {
        refused(&["--device", "cuda"], none, "no NVIDIA driver");
        refused(&["--device", "cuda"], ("LONAS_EMULATOR_ARCH", "75"), "compute capability 7.5");
        refused(&["--device", "cuda"], ("LONAS_EMULATOR_DEVICES", "0"), "no GPU 0");
    }
}
