// Render Ollama's template for a conversation, with Go's own text/template: go run render.go < {"template", "system", "messages"}
package main

import (
	"encoding/json"
	"os"
	"text/template"
)

type message struct{ Role, Content string }

func main() {
	var given struct {
		Template, System string
		Messages         []message
	}
	if err := json.NewDecoder(os.Stdin).Decode(&given); err != nil {
		panic(err)
	}
	if err := template.Must(template.New("").Parse(given.Template)).Execute(os.Stdout, given); err != nil {
		panic(err)
	}
}
