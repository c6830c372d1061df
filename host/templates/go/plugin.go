// The reward: how near the last number of an answer is to the number in the row's column `answer`.

package main

import (
	"encoding/json"
	"fmt"
	"math"
	"strconv"
	"strings"
)

// Settings is the plugin's `config`.
type Settings struct {
	// Relative error that still earns 1.
	Tolerance float64
	// What a number just outside of the tolerance would earn at an error of 0.
	Partial float64
}

var settings Settings

func configure(config []byte) error {
	wanted := Settings{Tolerance: 1e-6, Partial: 0.1}
	var given map[string]any
	if err := json.Unmarshal(config, &given); err != nil {
		return ConfigError(err.Error())
	}
	for key, value := range given {
		setting, known := map[string]*float64{"tolerance": &wanted.Tolerance, "partial": &wanted.Partial}[key]
		if !known {
			return ConfigError(fmt.Sprintf("unknown setting `%s`", key))
		}
		number, ok := value.(float64)
		if !ok || !(number >= 0) {
			return ConfigError(fmt.Sprintf("`%s` must be a number of at least 0", key))
		}
		*setting = number
	}
	settings = wanted
	return nil
}

func score(questions []Question, samples []Sample) ([]Verdict, error) {
	golds := make([]*float64, len(questions))
	for i, question := range questions {
		var err error
		if golds[i], err = gold(question.Row); err != nil {
			return nil, err
		}
	}
	verdicts := make([]Verdict, len(samples))
	for i, sample := range samples {
		verdicts[i] = judge(sample, golds[sample.Question])
	}
	return verdicts, nil
}

func judge(sample Sample, gold *float64) Verdict {
	if gold == nil {
		return Verdict{Skip: "column `answer` holds no number"}
	}
	answer := sample.Completion
	if sample.Answer != nil {
		answer = *sample.Answer
	}
	number := lastNumber(answer)
	if number == nil {
		return Verdict{}
	}
	off := math.Abs(*number-*gold) / max(math.Abs(*gold), 1)
	total := 1.0
	if off > settings.Tolerance {
		total = settings.Partial / (1 + off)
	}
	return Verdict{Total: total, Parts: []Part{{"error", min(off, 1e9)}}}
}

// gold is the number in the row's column `answer`, or nil if it holds none.
func gold(row string) (*float64, error) {
	var columns map[string]json.RawMessage
	if err := json.Unmarshal([]byte(row), &columns); err != nil {
		return nil, InputError(err.Error())
	}
	column, there := columns["answer"]
	if !there {
		return nil, InputError("row has no column `answer`")
	}
	var text string
	if json.Unmarshal(column, &text) == nil {
		return lastNumber(text), nil
	}
	var number *float64
	if json.Unmarshal(column, &number) != nil {
		return nil, nil
	}
	return number, nil
}

// lastNumber is the last decimal number of a text. Commas between its digits are ignored.
func lastNumber(text string) *float64 {
	end := strings.LastIndexAny(text, "0123456789") + 1
	start := end
	for start > 0 && strings.IndexByte("0123456789.,", text[start-1]) >= 0 {
		start--
	}
	if start == end {
		return nil
	}
	// Of `1.2.3` the last two pieces are a number.
	pieces := strings.Split(strings.ReplaceAll(text[start:end], ",", ""), ".")
	number, err := strconv.ParseFloat(strings.Join(pieces[max(len(pieces)-2, 0):], "."), 64)
	if err != nil || math.IsInf(number, 0) {
		return nil
	}
	if start > 0 && text[start-1] == '-' {
		number = -number
	}
	return &number
}
