/* Entry as the Multiboot specification says (32-bit protected mode, EBX = information), long mode, user mode and back. */
#include "../bare/entry.h"

#define USER_DATA 0x23
#define USER_CODE 0x2b
#define USER_FLAGS 0x2 /* interrupts off */

    .section .text.entry, "ax"
    .code32
    .balign 4
    .long 0x1badb002, 0, -0x1badb002
    .globl bench_entry
bench_entry:
    cli
    cld
    lgdt gdt_pointer
    ljmp $CODE32, $1f
1:  enter_mode
    ljmp $CODE64, $long_mode
    .code64
long_mode:
    mov $stack + STACK_SIZE, %esp
    mov %ebx, %edi
    call bench_main
1:  cli
    hlt
    jmp 1b

    .text
/* void run_as_user(void (*job)(void)) */
    .globl run_as_user
run_as_user:
    push %rbx
    push %rbp
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, supervisor_stack
    mov %rsp, %rax
    push $USER_DATA
    push %rax
    push $USER_FLAGS
    push $USER_CODE
    push $1f
    iretq
1:  sub $8, %rsp
    call *%rdi
    .globl user_end
user_end:
    ud2

/* Goes on behind run_as_user(). */
    .globl leave_user
leave_user:
    mov supervisor_stack, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbp
    pop %rbx
    ret

    .data
    .balign 16
    .globl gdt
gdt:
    flat_descriptors
    .quad 0x00cff3000000ffff
    .quad 0x00affb000000ffff
    .quad 0, 0 /* the task state segment: main.c fills it in */
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt

    identity_map 7

    .bss
    .globl trap_stack_end
    .balign 16
stack:
    .skip STACK_SIZE
    .skip STACK_SIZE
trap_stack_end:
supervisor_stack:
    .skip 8

    .section .note.GNU-stack, "", @progbits
