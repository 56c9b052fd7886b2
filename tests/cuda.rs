//! Super-networks on a GPU, or on the emulator that takes its place: against PyTorch + PEFT, and the whole server.

use crate::cli::classify;
use crate::cli::process::{Server, lonas};
use crate::golden::{self, Supernet, push};
use crate::logits::{LLAMAS, NETS};
use crate::tiny::{NAME, OTHER, Tiny};
use crate::{classifiers, dtypes};
use lonas::backend::cuda::{Counts, Cuda, Dtype, KvDtype};
use lonas::model::llama::LlamaExecutor;
use lonas::model::{Adapters, Batch, Executor};
use lonas::supernet::SubNetwork;
use serde_json::{Value, json};

const SOME: [(&str, &str); 3] =
    [LLAMAS[0], ("tiny-mistral/base", "tiny-mistral"), ("tiny-bloom/base", "tiny-bloom")];

/// Weights, and what products take, are rounded. However prompts are cut: steps of many rows have other kernels than those
/// of few.
#[test]
fn logits_are_those_of_pytorch_to_the_rounding_of_bf16() {
    let gpu = || Cuda::open(0).unwrap().with_kv(KvDtype::F32);
    // The emulator takes its time, so only some are fed in pieces: a LLaMA, one with a window, a BLOOM.
    for (chunk, nets) in [(100, NETS.as_slice()), (6, &SOME), (1, &SOME)] {
        dtypes::check_nets(nets, "bf16 on a GPU", gpu, dtypes::BF16_ERROR, chunk);
    }
}

#[test]
fn weights_in_blocks_cost_what_they_do_on_the_processor() {
    let gpu = |dtype| move || Cuda::open(0).unwrap().with_dtype(dtype).with_kv(KvDtype::F32);
    dtypes::check_nets(&SOME, "int8 on a GPU", gpu(Dtype::Int8), dtypes::INT8_ERROR, 6);
}

#[test]
fn classifiers_are_those_of_pytorch_to_the_rounding_of_their_weights() {
    for (dtype, most) in [Dtype::Auto, Dtype::Int8].into_iter().zip(classifiers::ROUNDED) {
        let gpu = Cuda::open(0).unwrap().with_dtype(dtype);
        classifiers::check_rounded(&format!("{dtype:?} on a GPU"), gpu, most);
    }
}

/// One step that decodes the next token of each of `sequences` at `position`, each with another sub-network.
fn decode(executor: &mut dyn Executor, net: &Supernet, subnetworks: &[SubNetwork], position: usize) {
    let mut batch = Batch::default();
    for (i, sub_network) in subnetworks.iter().enumerate() {
        let blocks = (0..8).map(|block| (8 * i + block) as u32).collect::<Vec<_>>();
        push(&mut batch, net.selection(i as u32, sub_network), &[3 + i as u32], position, &blocks);
    }
    let logits = executor.forward(&batch).unwrap();
    assert!(logits.values.iter().all(|logit| logit.is_finite()));
}

#[test]
fn each_part_of_a_step_that_decodes_is_one_upload_and_one_graph_whoever_is_in_it() {
    for (base, name) in SOME {
        check_decoding(&Supernet::open(base, name));
    }
}

fn check_decoding(net: &Supernet) {
    let gpu = Cuda::open(0).unwrap();
    let mut executor = net.executor(gpu.clone(), Adapters::Beside(vec![net.super_adapter()]), (200, 4));
    let all = [net.space.maximal(), net.space.heuristic(), net.space.minimal()];
    for position in 0..3 {
        decode(&mut *executor, net, &all, position);
    }
    let before = gpu.counts();
    let parts = before.graphs;
    assert!((1..=3).contains(&parts) && before.launches > 0, "{before:?}");
    let others = [&all[2], &all[2], &all[0]].map(Clone::clone);
    for position in 3..8 {
        decode(&mut *executor, net, if position % 2 == 0 { &others } else { &all }, position);
    }
    let after = Counts {
        uploads: before.uploads + 5 * parts,
        graph_launches: before.graph_launches + 5 * parts,
        ..before
    };
    assert_eq!(gpu.counts(), after);
    // Another number of rows is another graph, made when it comes again.
    for _ in 0..3 {
        decode(&mut *executor, net, &all[..2], 8);
    }
    let counts = gpu.counts();
    let graph_launches = after.graph_launches + 2 * parts;
    assert!(counts.graphs == 2 * parts && counts.graph_launches == graph_launches, "{counts:?}");
    assert_eq!(counts.allocations, after.allocations);
}

#[test]
fn memory_for_the_largest_step_is_there_before_the_first_request_or_the_reason_is_told() {
    let (base, name) = NETS[0];
    let net = Supernet::open(base, name);
    let gpu = Cuda::open(0).unwrap();
    let mut executor = LlamaExecutor::new(net.load(&gpu), gpu.clone(), 200, 4).unwrap();
    executor.prepare(40, &net.selection(0, &net.space.maximal())).unwrap();
    let before = gpu.counts();
    let mut batch = Batch::default();
    push(&mut batch, net.selection(0, &net.space.heuristic()), &[1; 30], 0, &[7, 3, 9, 1, 0, 2, 4, 5]);
    executor.forward(&batch).unwrap();
    assert_eq!(gpu.counts().allocations, before.allocations);
    if std::env::var_os("LONAS_EMULATED").is_some() {
        let tiny = Tiny::write();
        let model = tiny.model(NAME);
        // Enough for the weights and the pool, not for steps of a million tokens.
        let options = ["--device", "cuda", "--step-tokens", "1000000", "--kv-tokens", "100000"];
        let output = lonas(&["serve", model.to_str().unwrap()])
            .args(options)
            .env("LONAS_EMULATOR_MEMORY", (100 << 20).to_string())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.code() == Some(1)
                && said.contains("no memory for")
                && said.contains("MiB are free"),
            "{said}"
        );
    }
}

#[test]
fn a_step_that_fails_leaves_nothing_behind() {
    let (base, name) = NETS[0];
    let net = Supernet::open(base, name);
    let gpu = Cuda::open(0).unwrap();
    let mut executor = LlamaExecutor::new(net.load(&gpu), gpu.clone(), 200, 4).unwrap();
    let step = |blocks: &[u32]| {
        let mut batch = Batch::default();
        push(&mut batch, net.selection(0, &net.space.maximal()), &[5, 6, 7], 0, blocks);
        batch
    };
    let expected = executor.forward(&step(&[0])).unwrap().values;
    let before = gpu.counts();
    // Found out by the attention of the first layer, when its products are on the tape already.
    assert!(executor.forward(&step(&[200])).is_err());
    assert_eq!(gpu.counts(), before);
    assert!(executor.forward(&step(&[0])).unwrap().values == expected);
    let kernels =
        gpu.counts().launches + gpu.counts().graph_launches - before.launches - before.graph_launches;
    assert!(kernels == 2, "the same two parts again, and so graphs, not {kernels} kernels");
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
        // This processor may not round what products take; the tiny network's random weights amplify that.
        let common =
            ours.iter().filter_map(|(token, value)| Some((value.as_f64()?, theirs.get(token)?.as_f64()?)));
        let offs = common.map(|(a, b)| (a - b).abs()).collect::<Vec<_>>();
        assert!(offs.len() >= 4 && offs.iter().all(|off| *off < 0.2), "{model}: {ours:?}, not {theirs:?}");
    }
    let (_, metrics) = gpu.get("/metrics");
    assert!(metrics.contains("device=\"cuda\",dtype=\"auto\""), "{metrics}");
}

#[test]
fn the_server_classifies_as_on_the_processor() {
    let folder = tempfile::tempdir().unwrap();
    classify::base(folder.path());
    let models = classify::NAMES.map(|(name, _)| golden::path(name).join("supernet"));
    let [one, other] = [0, 1].map(|i| models[i].to_str().unwrap());
    let base = folder.path().to_str().unwrap();
    let start = |device: &str| Server::start(&[one, other, "--base", base, "--device", device]);
    let (gpu, processor) = (start("cuda"), start("cpu"));
    let pair = json!({"text": "the cat sat", "text_pair": "on the mat"});
    for (name, labels) in classify::NAMES {
        for sub_network in ["maximal", "heuristic", "minimal"] {
            let request =
                json!({"model": format!("{name}:{sub_network}"), "input": [pair, "the cat", "a dog sat"]});
            let [ours, theirs] =
                [&gpu, &processor].map(|server| classify::probs(&classify::ask(server, &request)));
            for (ours, theirs) in ours.iter().zip(&theirs) {
                let off = golden::distance(ours, theirs);
                assert!(ours.len() == labels && off < 0.05, "{request}: {ours:?}, not {theirs:?}");
            }
        }
    }
}

#[test]
fn bench_sets_its_rates_beside_what_the_gpu_can_do() {
    let tiny = Tiny::write();
    let model = tiny.model(NAME);
    let quick = "--rounds 1 --prompt 20 --output 2 --streams 1 --mixed-streams 5 --without-adapter --json \
                 --device cuda";
    let output = lonas(&["bench", model.to_str().unwrap()]).args(quick.split_whitespace()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()).collect::<Vec<_>>();
    assert!(lines.iter().all(|line| line["device"] == "cuda" && line["dtype"] == "auto"), "{text}");
    let of = |test: &str| lines.iter().filter(|line| line["test"] == test).collect::<Vec<_>>();
    let limits = of("limits")[0];
    assert!(limits["read_bytes_per_second"]["median"].as_f64() > Some(0.0), "{limits}");
    assert!(limits["f32_flops"]["median"].as_f64() > Some(0.0), "{limits}");
    assert!(limits["bf16_flops"]["median"].as_f64() > Some(0.0) && limits["int8_ops"].is_null(), "{limits}");
    // Three sub-networks, each with and without adapters; alone, in five streams, and all mixed in five.
    assert_eq!((of("prefill").len(), of("decode").len(), of("mixed").len()), (6, 12, 1));
    assert_eq!(of("mixed")[0]["streams"], 5);
}

#[test]
fn a_report_has_figures_operations_and_a_comparison_with_the_processor() {
    let tiny = Tiny::write();
    let (model, folder) = (tiny.model(NAME), tempfile::tempdir().unwrap());
    let report = folder.path().join("report");
    let quick = "--rounds 1 --prompt 100 --output 2 --streams 1 --device cuda \
                 --report-rows 2,40 --report-bytes 1 --report-llama-7b false --report";
    let output =
        lonas(&["bench", model.to_str().unwrap()]).args(quick.split_whitespace()).arg(&report).output();
    let output = output.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let read = |name: &str| std::fs::read_to_string(report.join(name)).unwrap();
    assert_eq!(read("bench.txt").as_bytes(), output.stdout);
    let lines = |name: &str| {
        read(name).lines().map(|l| serde_json::from_str::<Value>(l).unwrap()).collect::<Vec<_>>()
    };
    assert!(lines("bench.json").iter().any(|line| line["test"] == "decode"));
    let operations = lines("operations.json");
    // Three with and without an adapter, two without, each of two numbers of rows.
    assert_eq!(operations.len(), 2 * (2 * 3 + 2));
    assert!(operations.iter().all(|line| line["bandwidth"].as_f64() > Some(0.0)), "{operations:?}");
    let checks = read("checks.txt");
    assert!(checks.lines().count() == 3 && checks.contains("maximal: logits are off by 0.0"), "{checks}");
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
    refused(&["--device", "cuda", "--dtype", "f32"], ("A", ""), "--dtype f32");
    refused(&["--device", "cuda", "--kv-tokens", "99999999999"], ("A", ""), "key-value pool");
    // Without a driver; where a real one is installed beside the system's libraries, it is found all the same.
    if std::env::var_os("LONAS_EMULATED").is_some() {
        refused(&["--device", "cuda"], none, "no NVIDIA driver");
        refused(&["--device", "cuda"], ("LONAS_EMULATOR_ARCH", "75"), "compute capability 7.5");
        refused(&["--device", "cuda"], ("LONAS_EMULATOR_DEVICES", "0"), "no GPU 0");
    }
}
