// The same body from net/http, which stops as the documentation of Shutdown shows.
package main

import (
	"context"
	"log"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"
)

func main() {
	seconds, err := strconv.ParseFloat(os.Getenv("DELAY"), 64)
	if err != nil {
		log.Fatal(err)
	}
	_, body, _ := strings.Cut(os.Getenv("REPLY"), "\r\n\r\n")
	answer := func(writer http.ResponseWriter, _ *http.Request) {
		time.Sleep(time.Duration(seconds * float64(time.Second)))
		writer.Write([]byte(body))
	}
	server := http.Server{Addr: "127.0.0.1:" + os.Getenv("PORT"), Handler: http.HandlerFunc(answer)}

	stopped := make(chan struct{})
	go func() {
		signals := make(chan os.Signal, 1)
		signal.Notify(signals, syscall.SIGTERM)
		<-signals
		if err := server.Shutdown(context.Background()); err != nil {
			log.Print(err)
		}
		close(stopped)
	}()
	if err := server.ListenAndServe(); err != http.ErrServerClosed {
		log.Fatal(err)
	}
	<-stopped
}
