//! Log probabilities, of the answer and of an echoed prompt.

use super::alone::{Alone, Which, log_softmax};
use super::app::App;
use crate::golden;
use crate::tiny::X;
use serde_json::{Value, json};

const MAXIMAL: Which = Which { adapter: 0, name: "maximal" };

fn array<'a>(choice: &'a Value, key: &str) -> &'a Vec<Value> {
    choice["logprobs"][key].as_array().unwrap()
}

/// Value and expected value, f32 arithmetic between them.
fn near(value: &Value, expected: f64) -> bool {
    value.as_f64().is_some_and(|v| (v - expected).abs() < 2e-4)
}

#[tokio::test]
async fn an_echoed_prompt_has_the_log_probabilities_of_pytorch() {
    #[derive(serde::Deserialize)]
    struct Cases {
        tokens: Vec<Vec<u32>>,
    }
    let app = App::new();
    let Cases { tokens } = golden::json("tiny-tied/cases.json");
    let logits = golden::tensors("tiny-tied/logits.safetensors");
    for name in ["maximal", "heuristic", "minimal"] {
        let body = json!({"model": format!("tiny-tied:{name}"), "prompt": tokens, "echo": true, "logprobs": 1,
                          "max_tokens": 0});
        let answer = app.complete(body).await;
        for (i, prompt) in tokens.iter().enumerate() {
            let choice = &answer["choices"][i];
            let values = array(choice, "token_logprobs");
            assert_eq!(values.len(), prompt.len());
            assert_eq!(array(choice, "top_logprobs").len(), prompt.len());
            assert_eq!(array(choice, "text_offset").len(), prompt.len());
            let spelled = prompt.iter().map(|&t| Value::from(app.spelled(t))).collect::<Vec<_>>();
            assert_eq!(array(choice, "tokens"), &spelled);
            assert_eq!((&values[0], &array(choice, "top_logprobs")[0]), (&Value::Null, &Value::Null));
            let rows = logits[&format!("{name}/{i}")].chunks(97).collect::<Vec<_>>();
            assert_eq!(rows.len(), prompt.len());
            for at in 1..prompt.len() {
                let expected = log_softmax(rows[at - 1]);
                let own = expected[prompt[at] as usize];
                assert!(near(&values[at], own), "{name} {i} {at}: {} instead of {own}", values[at]);
                let top = array(choice, "top_logprobs")[at].as_object().unwrap();
                assert_eq!(top[&app.spelled(prompt[at])], values[at], "the same float in both places");
                let best = (0..97).max_by(|&a, &b| expected[a].total_cmp(&expected[b])).unwrap();
                assert!(near(&top[&app.spelled(best as u32)], expected[best]), "{name} {i} {at}");
            }
        }
    }
}

#[tokio::test]
async fn prompt_and_answer_stand_in_one_list() {
    let app = App::new();
    let prompt = app.encode("the list");
    let body = json!({"prompt": prompt, "echo": true, "logprobs": 2, "max_tokens": 5, "temperature": 0,
                      "ignore_eos": true});
    let answer = app.complete(body).await;
    let choice = &answer["choices"][0];
    let mut alone = Alone::new(&app.tiny);
    let mut all = prompt.clone();
    all.extend(alone.greedy(MAXIMAL, &prompt, 5));
    let logits = alone.logits(MAXIMAL, &all);
    assert_eq!(array(choice, "tokens").len(), prompt.len() + 5);
    for at in 1..all.len() {
        let expected = log_softmax(&logits[at - 1])[all[at] as usize];
        assert_eq!(array(choice, "tokens")[at], app.spelled(all[at]));
        assert!(near(&array(choice, "token_logprobs")[at], expected), "{at}: {choice}");
        let top = array(choice, "top_logprobs")[at].as_object().unwrap();
        assert!((2..=3).contains(&top.len()), "two, and the token itself if it is not one of them");
    }
}

#[tokio::test]
async fn temperature_and_bias_do_not_change_what_is_reported() {
    let app = App::new();
    let prompt = app.encode("the list");
    let body = json!({"prompt": prompt, "logprobs": 0, "max_tokens": 3, "temperature": 1.7,
                      "logit_bias": {(X.to_string()): 100}});
    let answer = app.complete(body).await;
    let all = [prompt.clone(), vec![X; 3]].concat();
    let logits = Alone::new(&app.tiny).logits(MAXIMAL, &all);
    for i in 0..3 {
        let expected = log_softmax(&logits[prompt.len() + i - 1])[X as usize];
        let got = &answer["choices"][0]["logprobs"]["token_logprobs"][i];
        assert!(near(got, expected), "the model's own distribution: {expected}, got {got}");
    }
}

/// Each token's offset is the number of characters that are complete where its bytes begin.
fn check_offsets(text: &str, offsets: &[Value], tokens: &[&[u8]]) {
    assert_eq!(tokens.concat(), text.as_bytes());
    let mut start = 0;
    for (offset, token) in offsets.iter().zip(tokens) {
        let complete = text.char_indices().filter(|(at, c)| at + c.len_utf8() <= start).count();
        assert_eq!(offset, complete, "byte {start} of {text:?}: {offsets:?}");
        start += token.len();
    }
    assert_eq!(offsets.len(), tokens.len());
}

#[tokio::test]
async fn offsets_count_characters_of_the_choices_text() {
    let app = App::new();
    let prompt = "an é and a 😀 or €";
    let ids = app.encode(prompt);
    let bytes = ids.iter().map(|&id| app.tokenizer.token_bytes(id)).collect::<Vec<_>>();
    let ask = |prompt: Value| json!({"prompt": prompt, "echo": true, "logprobs": 0, "max_tokens": 0});

    let of_ids = app.complete(ask(json!(ids))).await;
    let choice = &of_ids["choices"][0];
    check_offsets(choice["text"].as_str().unwrap(), array(choice, "text_offset"), &bytes);

    let of_text = app.complete(ask(json!(prompt))).await;
    let choice = &of_text["choices"][0];
    assert_eq!(choice["text"], prompt);
    let offsets = array(choice, "text_offset");
    assert_eq!((&array(choice, "tokens")[0], &offsets[0]), (&json!("<s>"), &json!(0)));
    // The tokenizer has put <s> in front; the client did not write it, so it takes no place in the text.
    check_offsets(prompt, &offsets[1..], &bytes[1..]);
}

#[tokio::test]
async fn offsets_of_an_answer_go_on_where_the_prompt_ends() {
    let app = App::new();
    let body = json!({"prompt": "the é", "echo": true, "logprobs": 0, "max_tokens": 3,
                      "logit_bias": {(X.to_string()): 100}});
    let answer = app.complete(body).await;
    let offsets = array(&answer["choices"][0], "text_offset");
    assert_eq!(answer["choices"][0]["text"], "the éxxx");
    assert_eq!(offsets[offsets.len() - 3..], [json!(5), json!(6), json!(7)]);
    // é of two tokens, twice: a penalty keeps either from coming twice running.
    let bias = json!({(of_byte(&app, 0xC3).to_string()): 60, (of_byte(&app, 0xA9).to_string()): 60});
    let body = json!({"prompt": "an é", "logprobs": 0, "max_tokens": 4, "temperature": 0, "frequency_penalty": 2,
                      "presence_penalty": 2, "logit_bias": bias});
    let answer = app.complete(body).await;
    assert_eq!(answer["choices"][0]["text"], "éé");
    assert_eq!(answer["choices"][0]["logprobs"]["text_offset"], json!([0, 0, 1, 1]));
}

fn of_byte(app: &App, byte: u8) -> u32 {
    (0..97).find(|&token| app.tokenizer.token_bytes(token) == [byte]).unwrap()
}

#[tokio::test]
async fn offsets_hold_for_bytes_that_are_no_text() {
    let app = App::new();
    // The end of a character without its beginning, then a beginning without its end.
    let [c3, a9, e2] = [0xC3, 0xA9, 0xE2].map(|byte| of_byte(&app, byte));
    let a = app.encode("a")[1];
    let prompt = [a, a9, a, c3, a9, e2, a];
    let body = json!({"prompt": prompt, "echo": true, "logprobs": 0, "max_tokens": 0});
    let answer = app.complete(body).await;
    let choice = &answer["choices"][0];
    assert_eq!(choice["text"], "a\u{FFFD}aé\u{FFFD}a");
    assert_eq!(choice["logprobs"]["text_offset"], json!([0, 1, 2, 3, 3, 4, 5]));
}
